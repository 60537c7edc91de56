"""Prometheus metrics. Label sets are closed: no caller can add a series."""

import os
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector

if TYPE_CHECKING:
    from service.model_slot import ServedModel

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_MILLISECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The service's metrics; under gunicorn all workers write to ``PROMETHEUS_MULTIPROC_DIR``."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        version = ("model_name", "model_version")
        self.requests = Counter(
            "convoy_requests",
            "Classification requests by outcome (ok, caller, load, state, ours).",
            (*version, "outcome"),
            registry=registry,
        )
        self.images = Counter("convoy_images", "Images classified.", version, registry=registry)
        self.request_seconds = Histogram(
            "convoy_request_seconds",
            "From the first byte read to the answer, answered requests.",
            version,
            buckets=_MILLISECONDS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "convoy_stage_seconds",
            "Time of one image in a stage (decode, queue, forward).",
            (*version, "stage"),
            buckets=_MILLISECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "convoy_batch_size",
            "Images in the forward pass that an image was part of.",
            version,
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.swaps = Counter(
            "convoy_swaps",
            "Versions that took over, or failed to.",
            ("model_name", "outcome"),
            registry=registry,
        )
        self.serving_version = Gauge(
            "convoy_serving_version",
            "Number of the version that a worker serves; the lowest of the workers.",
            ("model_name",),
            multiprocess_mode="livemin",
            registry=registry,
        )
        self.model_info = Gauge(
            "convoy_model_info",
            "1 for each version that serves, with the device and the plan that it serves by.",
            (*version, "device", "plan"),
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.queue_depth = Gauge(
            "convoy_queue_depth",
            "Images that wait in a worker, summed over the workers.",
            ("model_name",),
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.registry_age_seconds = Gauge(
            "convoy_registry_age_seconds",
            "Seconds since the puller last agreed with the registry.",
            ("model_name",),
            multiprocess_mode="mostrecent",
            registry=registry,
        )

    def swapped(self, name: str, before: "ServedModel | None", after: "ServedModel | None") -> None:
        """Note that ``after`` took over from ``before``, or that (None) a version was refused."""
        self.swaps.labels(name, "ok" if after else "failed").inc()
        if after is None:
            return
        if before is not None:
            self.model_info.labels(name, str(before.version), before.device, before.plan).set(0)
        self.model_info.labels(name, str(after.version), after.device, after.plan).set(1)
        self.serving_version.labels(name).set(after.version)

    def render(self) -> bytes:
        """All workers' metrics in Prometheus' text format."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        everyone = CollectorRegistry()
        MultiProcessCollector(everyone)  # type: ignore[no-untyped-call]  # untyped in 0.26
        return generate_latest(everyone)
