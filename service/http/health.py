"""Probes and metrics, for orchestrators and monitoring systems."""

import time

import msgspec
from flask import Blueprint, Response, request
from msgspec import Struct

from service.loading.model_slot import ModelSlot
from service.observability.metrics import CONTENT_TYPE
from service.server.protocol import ENDING
from service.state import State, state

blueprint = Blueprint("health", __name__)


class ModelState(Struct, frozen=True, kw_only=True):
    """Whether one model serves, and when the puller last agreed with the registry."""

    name: str
    version: int | None
    device: str | None
    plan: str | None
    error: str | None
    registry_age_s: float | None
    stale: bool
    registry_error: str | None


class Readiness(Struct, frozen=True, kw_only=True):
    """Whether the service answers; ``ending`` is the reason if this worker is about to end."""

    ready: bool
    ending: str | None
    models: list[ModelState]


READINESS_EXAMPLE = Readiness(
    ready=True,
    ending=None,
    models=[
        ModelState(
            name="fashion",
            version=1,
            device="cpu",
            plan="openvino-fp32",
            error=None,
            registry_age_s=0.3,
            stale=False,
            registry_error=None,
        )
    ],
)


@blueprint.get("/livez")
def livez() -> Response:
    """200 as long as this process answers."""
    return Response("ok\n", mimetype="text/plain")


@blueprint.get("/readyz")
@blueprint.get("/healthz")
def readyz() -> Response:
    """200 when every model has a version that is loaded, warmed up and proved; else 503.

    The answer has for each model how long ago the puller last agreed with the registry. A version
    that still serves while the registry is down is ready, and after ``CONVOY_STALE_S`` also stale.
    """
    body = readiness(state(), ENDING in request.environ)
    return Response(
        msgspec.json.encode(body), 200 if body.ready else 503, mimetype="application/json"
    )


def readiness(current: State, ending: bool) -> Readiness:
    """Whether this worker can answer classification requests, and the state of each model.

    Args:
        current: the worker's state.
        ending: whether the worker received SIGTERM.
    """
    slots = current.slots.values()
    reason = current.watchdog.reason or ("shutting down" if ending else None)
    ready = reason is None and all(slot.current is not None for slot in slots)
    stale_s = current.settings.stale_s
    return Readiness(
        ready=ready, ending=reason, models=[_describe(each, stale_s) for each in slots]
    )


def is_ready() -> bool:
    """Whether the worker that handles this Flask request can answer classification requests."""
    return readiness(state(), ENDING in request.environ).ready


@blueprint.get("/metrics")
def metrics() -> Response:
    """The metrics of all workers, in Prometheus' text format."""
    current = state()
    for slot in current.slots.values():
        if (age_s := slot.pull_status().age_s) is not None:
            current.metrics.families.last_sync_timestamp_seconds.labels(slot.ref.name).set(
                round(time.time() - age_s, 1)
            )
    return Response(current.metrics.render(), content_type=CONTENT_TYPE)


def _describe(slot: ModelSlot, stale_s: float) -> ModelState:
    served, status = slot.current, slot.pull_status()
    age_s = status.age_s
    return ModelState(
        name=slot.ref.name,
        version=served.version if served else None,
        device=served.device if served else None,
        plan=served.plan if served else None,
        error=slot.error,
        registry_age_s=None if age_s is None else round(age_s, 1),
        stale=age_s is not None and age_s > stale_s,
        registry_error=status.error,
    )
