"""``GET /v1/models``: the served models, with their preprocessing, metrics and traffic."""

from typing import Any

import msgspec
from flask import Blueprint, Response, g
from msgspec import Struct

from registry.canary.traffic_stats import ServingStatus, VersionTraffic, WorkerReport
from registry.core.names import Sha256
from registry.model.manifest import (
    DataRecord,
    ListedNetwork,
    NetworkSpec,
    PreprocessSpec,
    SourceRecord,
)
from registry.model.refs import Canary
from service.inference.loaded_model import ServedModel
from service.inference.requests import Target
from service.loading.model_slot import ModelSlot
from service.state import state

blueprint = Blueprint("models", __name__)


class ModelSummary(Struct, frozen=True, kw_only=True):
    """One model: the version that serves, or why no version serves."""

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
    """One version that serves, with the canary and the workers of its model."""

    canary: Canary | None
    workers: list[WorkerReport]
    labels: tuple[str, ...]
    preprocess: PreprocessSpec
    network: NetworkSpec
    metrics: dict[str, float]
    data: DataRecord
    source: SourceRecord
    manifest_sha256: Sha256


_SUMMARY_EXAMPLE: dict[str, Any] = {
    "name": "fashion",
    "wanted": "models:/fashion@champion",
    "ready": True,
    "version": 1,
    "alias": "champion",
    "device": "cpu",
    "plan": "openvino-fp32",
    "error": None,
}
_WORKERS_EXAMPLE = [
    WorkerReport(pid=4711, model="fashion", version=1, generation=1, serving_key=1, prepared_key=1)
]
LIST_EXAMPLE = ModelList([ModelSummary(**_SUMMARY_EXAMPLE)])
DETAILS_EXAMPLE = ModelDetails(
    **_SUMMARY_EXAMPLE,
    canary=None,
    workers=_WORKERS_EXAMPLE,
    labels=("Sneaker", "Ankle boot"),
    preprocess=PreprocessSpec(mode="L", width_px=28, height_px=28, mean=(0.286,), std=(0.353,)),
    network=ListedNetwork("cnn", {"filters": [32, 64], "hidden": 128}),
    metrics={"validation_accuracy": 0.93, "test_accuracy": 0.925},
    data=DataRecord(name="fashion", sha256="5" * 64, counts={"train": 54_000, "test": 10_000}),
    source=SourceRecord(recipe="cnn", seed=0, device="cpu"),
    manifest_sha256="6" * 64,
)
TRAFFIC_EXAMPLE = ServingStatus(
    model="fashion",
    generation=1,
    champion=1,
    workers=tuple(_WORKERS_EXAMPLE),
    versions=(
        VersionTraffic(
            version=1,
            requests=120,
            buckets=((0.0025, 90), (0.005, 30)),
            seconds=0.31,
            images=120,
            confidence=112.4,
        ),
    ),
)


@blueprint.get("/v1/models")
def list_models() -> Response:
    """All models of this service, each with its version or the reason why none is loaded."""
    summaries = [ModelSummary(**_summary(slot, slot.current)) for slot in state().slots.values()]
    return _json(ModelList(summaries))


@blueprint.get("/v1/models/<name>")
@blueprint.get("/v1/models/<name>/versions/<int:version>")
@blueprint.get("/v1/models/<name>/aliases/<alias>")
def show_model(name: str, version: int | None = None, alias: str | None = None) -> Response:
    """One loaded version: by number, by alias, or the champion if the path has neither.

    Raises:
        ModelNotFound, VersionNotFound: this service does not serve it.
        ModelNotReady: no version is loaded yet, or this worker is about to end.
    """
    current = state()
    served, serving = current.pipeline.find(Target(name, version, alias))
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
    """Each version's traffic since the service started, and what each worker serves."""
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
    """The fields of a ``ModelSummary``: ``slot`` has the model, ``served`` is its version."""
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
