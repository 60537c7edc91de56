"""``GET /v1/models``: what is served, how it sees pictures, and what it is worth."""

from typing import Any

import msgspec
from flask import Blueprint, Response, g

from registry.canary.traffic_stats import Live
from service.inference.loaded_model import ServedModel
from service.loading.deployment_watcher import ModelSlot
from service.state import state

blueprint = Blueprint("models", __name__)


@blueprint.get("/v1/models")
def list_models() -> Response:
    return _json({"models": [_summary(slot) for slot in state().slots.values()]})


@blueprint.get("/v1/models/<name>")
@blueprint.get("/v1/models/<name>/versions/<int:version>")
@blueprint.get("/v1/models/<name>/aliases/<alias>")
def show_model(name: str, version: int | None = None, alias: str | None = None) -> Response:
    current = state()
    served, serving = current.served(name, version, alias)
    g.served = served
    slot = current.slot(name)
    return _json(
        {
            **_summary(slot),
            "version": served.version,
            "alias": served.alias,
            "device": served.device,
            "plan": served.plan,
            "trial": serving.trial,
            "workers": slot.workers(),
            **_details(served),
        }
    )


@blueprint.get("/v1/models/<name>/traffic")
def show_traffic(name: str) -> Response:
    """What each version did since the service started, and what every worker serves."""
    current = state()
    slot = current.slot(name)
    serving = slot.serving
    return _json(
        Live(
            model=slot.ref.name,
            generation=serving.release.generation if serving else None,
            champion=serving.champion.version if serving else None,
            challenger=serving.trial.version if serving and serving.trial else None,
            workers=tuple(slot.workers()),
            versions=current.metrics.traffic(slot.ref.name),
        )
    )


def _summary(slot: ModelSlot) -> dict[str, Any]:
    served = slot.current
    return {
        "name": slot.ref.name,
        "wanted": str(slot.ref),
        "ready": served is not None,
        "version": served.version if served else None,
        "alias": served.alias if served else None,
        "device": served.device if served else None,
        "plan": served.plan if served else None,
        "error": slot.error,
    }


def _details(served: ServedModel) -> dict[str, Any]:
    manifest = served.manifest
    return {
        "labels": manifest.labels,
        "preprocess": manifest.preprocess,
        "network": manifest.network,
        "metrics": manifest.metrics,
        "data": manifest.data,
        "source": manifest.source,
        "manifest_sha256": served.manifest_sha256,
    }


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), mimetype="application/json")
