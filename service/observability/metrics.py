"""Prometheus metrics. The label values are a closed set, so no client can add a time series."""

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric

from registry.canary.traffic_stats import UNBOUNDED_S, VersionTraffic
from service.observability.metric_files import AllProcesses

if TYPE_CHECKING:
    from service.inference.batcher import OnBatch
    from service.inference.loaded_model import ServedModel
    from service.inference.pipeline import AnsweredRequest

log = logging.getLogger(__name__)

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
FLUSH_S = 0.5
MAX_NOTES = 100_000  # bounds the memory while metrics cannot be written
OUTCOMES = ("ok", "client_error", "overload", "unavailable", "server_error")
_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_BUCKETS_PROBABILITY = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class MetricBuffer:
    """Figures of one version that ``flush`` has not written yet.

    Requests only append to the buffer, which is cheaper than writing a metric that workers share.
    """

    def __init__(self) -> None:
        self.requests: deque[AnsweredRequest] = deque(maxlen=MAX_NOTES)
        self.batches: deque[tuple[int, float, int]] = deque(maxlen=MAX_NOTES)
        self.shadowed: deque[tuple[str, int]] = deque(maxlen=MAX_NOTES)

    def note_batch(self, size: int, forward_s: float, waiting: int) -> None:
        """Note one forward pass: its images, its seconds, and the images that still wait.

        When ``MAX_NOTES`` are noted, each further one replaces the oldest.
        """
        self.batches.append((size, forward_s, waiting))


class Snapshot:
    """The metrics of all processes at one moment, as a Prometheus collector."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)
        self.taken = time.monotonic()
        self._text: bytes | None = None

    def collect(self) -> Iterable[Metric]:
        """The metric families of that moment; prometheus_client calls this method."""
        return self._families

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        if self._text is None:
            self._text = generate_latest(self)
        return self._text


class Metrics:
    """The service's metrics; under gunicorn all workers write to ``PROMETHEUS_MULTIPROC_DIR``."""

    def __init__(self, max_age_s: float = 0.0) -> None:
        """``max_age_s``: how old the figures may be that ``render`` and ``traffic`` return.

        Collecting takes from a few to hundreds of milliseconds, and every client may ask.
        """
        self._max_age_s = max_age_s
        self._snapshot: Snapshot | None = None
        self._collecting = Lock()
        self._registry = registry = CollectorRegistry()
        self._of_version: dict[tuple[str, int], MetricBuffer] = {}
        self._flushing = Lock()
        self._info_labels: dict[str, tuple[str, str, str, str]] = {}
        version = ("model_name", "model_version")
        self.requests = Counter(
            "convoy_requests",
            f"Classification requests by outcome ({', '.join(OUTCOMES)}).",
            (*version, "outcome"),
            registry=registry,
        )
        self.images = Counter("convoy_images", "Images classified.", version, registry=registry)
        self.request_seconds = Histogram(
            "convoy_request_seconds",
            "Seconds from the first byte read to the answer, of answered requests.",
            version,
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "convoy_stage_seconds",
            "Seconds in a stage: read, decode, queue, encode of a request, forward of a batch.",
            (*version, "stage"),
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self.batch_size = Histogram(
            "convoy_batch_size",
            "Images in a forward pass.",
            version,
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.version_switches = Counter(
            "convoy_version_switches",
            "Deployments that this worker switched to, or could not load.",
            ("model_name", "outcome"),
            registry=registry,
        )
        self.serving_version = Gauge(
            "convoy_serving_version",
            "Number of the version that serves; the lowest of all workers.",
            ("model_name",),
            multiprocess_mode="livemin",
            registry=registry,
        )
        self.model_info = Gauge(
            "convoy_model_info",
            "1 for the champion that serves, with its device and its plan.",
            (*version, "device", "plan"),
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.confidence = Histogram(
            "convoy_confidence",
            "Probability of the best class of each answered image.",
            version,
            buckets=_BUCKETS_PROBABILITY,
            registry=registry,
        )
        self.shadow_images = Counter(
            "convoy_shadow_images",
            "Images for the shadow: agreed, differed or failed when scored, or dropped.",
            (*version, "outcome"),
            registry=registry,
        )
        self.queue_depth = Gauge(
            "convoy_queue_depth",
            "Images that wait, summed over the workers.",
            ("model_name",),
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.last_sync_timestamp_seconds = Gauge(
            "convoy_last_sync_timestamp_seconds",
            "When the puller last agreed with the registry, in seconds since 1970.",
            ("model_name",),
            multiprocess_mode="livemostrecent",
            registry=registry,
        )

    def expect(self, name: str, version: str = "") -> None:
        """Create the counters of a version, or of a model, that alarms use, with the value 0.

        Prometheus sees no increase if the first value that it reads is already 1.
        """
        for outcome in OUTCOMES:
            self.requests.labels(name, version, outcome)
        for outcome in ("ok", "failed"):
            self.version_switches.labels(name, outcome)

    def answered(self, name: str, version: int, request: "AnsweredRequest") -> None:
        """Note a request that was answered."""
        self._buffer(name, version).requests.append(request)

    def refused(self, name: str, version: int | None, outcome: str) -> None:
        """Count a request that failed; ``name`` is "" if the service does not have the model."""
        self.requests.labels(name, "" if version is None else str(version), outcome).inc()

    def on_batch(self, name: str, version: int) -> "OnBatch":
        """The function that the version's batcher calls after each batch."""
        return self._buffer(name, version).note_batch

    def shadowed(self, name: str, version: int, outcome: str, images: int) -> None:
        """Note the outcome of images that were meant for the shadow."""
        self._buffer(name, version).shadowed.append((outcome, images))

    def flush(self) -> None:
        """Write the buffered figures. After ``start``, this happens every ``FLUSH_S``."""
        with self._flushing:
            for (name, version), buffer in list(self._of_version.items()):
                self._write(name, str(version), buffer)

    def start(self) -> None:
        """Flush from a daemon thread from now on."""

        def run() -> None:
            while True:
                time.sleep(FLUSH_S)
                try:
                    self.flush()
                except Exception:  # the edge of a thread: a full disk must not end it
                    log.exception("cannot write metrics")

        Thread(target=run, name="metrics", daemon=True).start()

    def _buffer(self, name: str, version: int) -> "MetricBuffer":
        if buffer := self._of_version.get((name, version)):
            return buffer
        self.expect(name, str(version))
        return self._of_version.setdefault((name, version), MetricBuffer())

    def _write(self, name: str, version: str, buffer: "MetricBuffer") -> None:
        if requests := _drain(buffer.requests):
            self.requests.labels(name, version, "ok").inc(len(requests))
            self.images.labels(name, version).inc(sum(each.images for each in requests))
            confidences = [value for each in requests for value in each.confidences]
            _observe(self.confidence.labels(name, version), confidences)
            total_s = [each.total_s for each in requests]
            _observe(self.request_seconds.labels(name, version), total_s)
            for stage in ("read", "decode", "queue", "encode"):
                stage_s = [getattr(each, f"{stage}_s") for each in requests]
                _observe(self.stage_seconds.labels(name, version, stage), stage_s)
        if batches := _drain(buffer.batches):
            sizes, forward_s, waiting = zip(*batches, strict=True)
            _observe(self.stage_seconds.labels(name, version, "forward"), forward_s)
            _observe(self.batch_size.labels(name, version), sizes)
            self.queue_depth.labels(name).set(waiting[-1])

        for outcome, images in _drain(buffer.shadowed):
            self.shadow_images.labels(name, version, outcome).inc(images)

    def version_switched(
        self, name: str, before: "ServedModel | None", after: "ServedModel | None"
    ) -> None:
        """Count a switch from ``before`` to ``after``, or if that is None, a failure to load."""
        self.version_switches.labels(name, "ok" if after else "failed").inc()
        if after is None:
            return
        # Clear the labels that were set last, not those of ``before``: if its device was lost,
        # ``before`` is None.
        if labels := self._info_labels.get(name):
            self.model_info.labels(*labels).set(0)
        self._info_labels[name] = labels = name, str(after.version), after.device, after.plan
        self.model_info.labels(*labels).set(1)
        self.serving_version.labels(name).set(after.version)

    def render(self) -> bytes:
        """All workers' metrics in Prometheus' text format."""
        return self._all_workers().text()

    def traffic(self, name: str) -> tuple[VersionTraffic, ...]:
        """The traffic of each version of ``name``, in all workers, since the service started."""
        found: dict[int, TrafficAccumulator] = {}
        for family in self._all_workers().collect():
            for sample in family.samples:
                labels = sample.labels
                if labels.get("model_name") == name and labels.get("model_version"):
                    accumulator = found.setdefault(
                        int(labels["model_version"]), TrafficAccumulator()
                    )
                    accumulator.add(sample.name, labels, sample.value)
        return tuple(found[version].traffic(version) for version in sorted(found))

    def _all_workers(self) -> Snapshot:
        """The metrics of all workers, at most ``max_age_s`` old."""
        with self._collecting:
            snapshot = self._snapshot
            if snapshot is None or time.monotonic() >= snapshot.taken + self._max_age_s:
                self.flush()
                folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
                source = AllProcesses(Path(folder)) if folder else self._registry
                snapshot = self._snapshot = Snapshot(source.collect())
            return snapshot


class TrafficAccumulator:
    """Sums up the samples of one version for ``VersionTraffic``."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._up_to: dict[float, float] = {}

    def add(self, name: str, labels: dict[str, str], value: float) -> None:
        """Add one sample of the version, from any process.

        Args:
            name: the sample's name, such as ``convoy_requests_total``.
            labels: the sample's labels; requests and shadow images need ``outcome``, buckets
                ``le``.
            value: the count or sum; that of a bucket is cumulative, as Prometheus has it.
        """
        if name == "convoy_requests_total":
            is_error = labels["outcome"] in ("server_error", "overload")
            name = "requests" if labels["outcome"] == "ok" else "errors" if is_error else "other"
        elif name == "convoy_shadow_images_total":
            name = labels["outcome"]
        elif name == "convoy_request_seconds_bucket":
            self._up_to[min(float(labels["le"]), UNBOUNDED_S)] = value
            return
        self._counts[name] = self._counts.get(name, 0) + value

    def traffic(self, version: int) -> VersionTraffic:
        """The sums so far, as the traffic of ``version``; its buckets are not cumulative."""
        bounds = sorted(self._up_to)
        below = [0.0, *(self._up_to[bound] for bound in bounds)]
        names = ("requests", "errors", "agreed", "differed", "failed", "dropped")
        return VersionTraffic(
            version=version,
            seconds=self._counts.get("convoy_request_seconds_sum", 0.0),
            images=int(self._counts.get("convoy_images_total", 0)),
            confidence=self._counts.get("convoy_confidence_sum", 0.0),
            buckets=tuple(
                (bound, int(upper - lower))
                for bound, lower, upper in zip(bounds, below, below[1:], strict=False)
            ),
            **{name: int(self._counts.get(name, 0)) for name in names},
        )


Row = TypeVar("Row")


def _drain(notes: deque[Row]) -> list[Row]:
    return [notes.popleft() for _ in range(len(notes))]


def _observe(histogram: Histogram, values: Sequence[float]) -> None:
    """As ``histogram.observe`` for every value, but this writes each bucket only once.

    prometheus_client 0.26 has no such method, so this uses a histogram's private attributes.
    """
    places = np.searchsorted(histogram._upper_bounds, values)  # noqa: SLF001
    for place, count in zip(*np.unique(places, return_counts=True), strict=True):
        histogram._buckets[place].inc(int(count))  # noqa: SLF001
    histogram._sum.inc(float(np.sum(values)))  # noqa: SLF001
