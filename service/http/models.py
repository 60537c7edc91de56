"""``GET /v1/models``: what is served, how it sees pictures, and what it is worth."""

from typing import Any

import msgspec
from flask import Blueprint, Response, g
from msgspec import Struct

from registry.canary.traffic_stats import ServingStatus, WorkerReport
from registry.core.names import Sha256
from registry.model.manifest import DataRecord, NetworkSpec, PreprocessSpec, SourceRecord
from registry.model.refs import Canary
from service.inference.loaded_model import ServedModel
from service.loading.model_slot import ModelSlot
from service.state import state

blueprint = Blueprint("models", __name__)


class ModelSummary(Struct, frozen=True, kw_only=True):
    """One model: the version that serves, or why none does."""

    name: str
    wanted: str
    ready: bool
    version: int | None
    alias: str | None
    device: str | None
    plan: str | None
    error: str | None


class ModelList(Struct, frozen=True):
    """All models of the service."""

    models: list[ModelSummary]


class ModelDetails(ModelSummary, frozen=True, kw_only=True):
    """One version that serves, and what serves beside it."""

    canary: Canary | None
    workers: list[WorkerReport]
    labels: tuple[str, ...]
    preprocess: PreprocessSpec
    network: NetworkSpec
    metrics: dict[str, float]
    data: DataRecord
    source: SourceRecord
    manifest_sha256: Sha256


@blueprint.get("/v1/models")
def list_models() -> Response:
    summaries = [ModelSummary(**_summary(slot, slot.current)) for slot in state().slots.values()]
    return _json(ModelList(summaries))


@blueprint.get("/v1/models/<name>")
@blueprint.get("/v1/models/<name>/versions/<int:version>")
@blueprint.get("/v1/models/<name>/aliases/<alias>")
def show_model(name: str, version: int | None = None, alias: str | None = None) -> Response:
    current = state()
    served, serving = current.pipeline.find(name, version, alias)
    g.served = served
    slot, manifest = current.slot(name), served.manifest
    return _json(
        ModelDetails(
            **_summary(slot, served),
            canary=serving.canary,
            workers=slot.workers(),
            labels=manifest.labels,
            preprocess=manifest.preprocess,
            network=manifest.network,
            metrics=manifest.metrics,
            data=manifest.data,
            source=manifest.source,
            manifest_sha256=served.manifest_sha256,
        )
    )


@blueprint.get("/v1/models/<name>/traffic")
def show_traffic(name: str) -> Response:
    """What each version did since the service started, and what every worker serves."""
    current = state()
    slot = current.slot(name)
    serving = slot.serving
    return _json(
        ServingStatus(
            model=slot.ref.name,
            generation=serving.deployment.generation if serving else None,
            champion=serving.champion.version if serving else None,
            challenger=serving.canary.version if serving and serving.canary else None,
            workers=tuple(slot.workers()),
            versions=current.metrics.traffic(slot.ref.name),
        )
    )


def _summary(slot: ModelSlot, served: ServedModel | None) -> dict[str, Any]:
    """The fields of a ``ModelSummary`` about the version ``served`` of the model in ``slot``."""
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


def _json(value: Struct) -> Response:
    return Response(msgspec.json.encode(value), mimetype="application/json")
