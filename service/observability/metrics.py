"""``Metrics``: buffers what happens, and writes it to Prometheus' metrics."""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from registry.canary.traffic_stats import VersionTraffic
from service.observability.metric_families import OUTCOMES, PROTOCOLS, Families
from service.observability.metric_files import AllProcesses
from service.observability.traffic_accumulator import TrafficAccumulator

if TYPE_CHECKING:
    from service.inference.batcher import OnBatch
    from service.inference.loaded_model import ServedModel
    from service.inference.requests import AnsweredRequest

log = logging.getLogger(__name__)

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
FLUSH_S = 0.5
MAX_NOTES = 100_000  # bounds the memory while metrics cannot be written


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
    """The service's metrics; under gunicorn all workers write to ``PROMETHEUS_MULTIPROC_DIR``.

    It has many methods because each kind of event is one of them.
    """

    def __init__(self, max_age_s: float = 0.0) -> None:
        """``max_age_s``: how old the figures may be that ``render`` and ``traffic`` return.

        Collecting takes from a few to hundreds of milliseconds, and every client may ask.
        """
        self._max_age_s = max_age_s
        self._snapshot: Snapshot | None = None
        self._collecting = Lock()
        self._registry = CollectorRegistry()
        self._of_version: dict[tuple[str, int], MetricBuffer] = {}
        self._flushing = Lock()
        self._info_labels: dict[str, tuple[str, str, str, str]] = {}
        self.families = Families(self._registry)

    def expect(self, name: str, version: str = "") -> None:
        """Create the counters of a version, or of a model, that alarms use, with the value 0.

        Prometheus sees no increase if the first value that it reads is already 1.
        """
        for protocol in PROTOCOLS:
            for outcome in OUTCOMES:
                self.families.requests.labels(name, version, protocol, outcome)
        for outcome in ("ok", "failed"):
            self.families.version_switches.labels(name, outcome)

    def answered(self, name: str, version: int, request: "AnsweredRequest") -> None:
        """Note a request that was answered."""
        self._buffer(name, version).requests.append(request)

    def refused(self, name: str, version: int | None, protocol: str, outcome: str) -> None:
        """Count a request that failed; ``name`` is "" if the service does not have the model."""
        number = "" if version is None else str(version)
        self.families.requests.labels(name, number, protocol, outcome).inc()

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
                _write(self.families, name, str(version), buffer)

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

    def version_switched(
        self, name: str, before: "ServedModel | None", after: "ServedModel | None"
    ) -> None:
        """Count a switch from ``before`` to ``after``, or if that is None, a failure to load."""
        self.families.version_switches.labels(name, "ok" if after else "failed").inc()
        if after is None:
            return
        # Clear the labels that were set last, not those of ``before``: if its device was lost,
        # ``before`` is None.
        if labels := self._info_labels.get(name):
            self.families.model_info.labels(*labels).set(0)
        self._info_labels[name] = labels = name, str(after.version), after.device, after.plan
        self.families.model_info.labels(*labels).set(1)
        self.families.serving_version.labels(name).set(after.version)

    def render(self) -> bytes:
        """All workers' metrics in Prometheus' text format."""
        return self._all_workers().text()

    def traffic(self, name: str) -> tuple[VersionTraffic, ...]:
        """The traffic of each version of ``name``, in all workers, since the service started."""
        found: dict[int, TrafficAccumulator] = {}
        for sample in self.samples(name):
            accumulator = found.setdefault(
                int(sample.labels["model_version"]), TrafficAccumulator()
            )
            accumulator.add(sample.name, sample.labels, sample.value)
        return tuple(found[version].traffic(version) for version in sorted(found))

    def samples(self, name: str) -> Iterator[Sample]:
        """The samples of all versions of ``name``, in all workers, since the service started."""
        for family in self._all_workers().collect():
            for sample in family.samples:
                labels = sample.labels
                if labels.get("model_name") == name and labels.get("model_version"):
                    yield sample

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


Row = TypeVar("Row")


def _write(families: Families, name: str, version: str, buffer: "MetricBuffer") -> None:
    if requests := _drain(buffer.requests):
        for protocol, count in Counter(each.protocol for each in requests).items():
            families.requests.labels(name, version, protocol, "ok").inc(count)
        families.images.labels(name, version).inc(sum(each.images for each in requests))
        confidences = [value for each in requests for value in each.confidences]
        _observe(families.confidence.labels(name, version), confidences)
        total_s = [each.total_s for each in requests]
        _observe(families.request_seconds.labels(name, version), total_s)
        for stage in ("read", "decode", "queue", "encode"):
            stage_s = [getattr(each, f"{stage}_s") for each in requests]
            _observe(families.stage_seconds.labels(name, version, stage), stage_s)
    if batches := _drain(buffer.batches):
        sizes, forward_s, waiting = zip(*batches, strict=True)
        _observe(families.stage_seconds.labels(name, version, "forward"), forward_s)
        _observe(families.batch_size.labels(name, version), sizes)
        families.queue_depth.labels(name).set(waiting[-1])
    for outcome, images in _drain(buffer.shadowed):
        families.shadow_images.labels(name, version, outcome).inc(images)


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
