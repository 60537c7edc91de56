"""``GET /v1/models``: what is served, how it sees pictures, and what it is worth."""

from typing import Any

import msgspec
from flask import Blueprint, Response, g

from service.model_slot import ModelSlot, ServedModel
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
    served = g.served = current.served(name, version, alias)
    return _json({**_summary(current.slot(name)), **_details(served)})


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
