"""How each model was served in the last minutes: samples, and the figures that charts show."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from threading import Event, Lock
from time import monotonic

from msgspec import Struct

from registry.canary.traffic_stats import ServingStatus
from registry.core.errors import ConvoyError, ModelNotReady

log = logging.getLogger(__name__)

SAMPLE_INTERVAL_S = 2.0
MAX_SAMPLES = 150
MAX_GAP_S = 60.0


class Series(Struct, frozen=True, kw_only=True):
    """A version's values, one for each of ``Figures.seconds``; None if it answered no request."""

    role: str
    version: int
    values: list[float | None]


class Chart(Struct, frozen=True, kw_only=True):
    """A chart of one quantity: a line for the champion, and one for the challenger if there is one.

    All values are in ``unit``: ``/s``, ``ms`` or ``%``.
    """

    title: str
    unit: str
    series: list[Series]


class Figures(Struct, frozen=True, kw_only=True):
    """The charts of a model; ``seconds`` is the time of each value, 0 for the newest."""

    seconds: list[float]
    charts: list[Chart]


class TrafficHistory:
    """The samples of each model. Threads may share it."""

    def __init__(self, read: Callable[[str], ServingStatus]) -> None:
        self._read = read
        self._samples: dict[str, deque[tuple[float, ServingStatus]]] = {}
        self._failures: dict[str, tuple[float, str]] = {}
        self._locks: dict[str, Lock] = {}

    def samples(self, name: str) -> list[tuple[float, ServingStatus]]:
        """The samples of ``name``, oldest first. Adds one if the newest is at least 2 s old.

        Raises:
            ModelNotReady: a service cannot be reached, or does not serve the model.
        """
        with self._locks.setdefault(name, Lock()):  # keeps samples in the order of their times
            rows = self._samples.get(name, deque(maxlen=MAX_SAMPLES))
            now = monotonic()
            failed_at, failure = self._failures.get(name, (0.0, ""))
            if failure and now - failed_at < SAMPLE_INTERVAL_S:
                # Callers must not wait in turn for a service that is away.
                raise ModelNotReady(failure)
            if rows and now - rows[-1][0] > MAX_GAP_S:
                rows.clear()  # a chart would draw a line through the time without measurements
            if not rows or now - rows[-1][0] >= SAMPLE_INTERVAL_S:
                try:
                    rows.append((now, self._read(name)))
                except ModelNotReady as error:
                    self._failures[name] = monotonic(), str(error)
                    raise
            self._samples[name] = rows
            return list(rows)

    def watch(self, names: Callable[[], Iterable[str]], stop: Event) -> None:
        """Sample every model until ``stop`` is set, so that a page has its charts when it opens."""
        failed = False
        while not stop.wait(SAMPLE_INTERVAL_S):
            try:
                for name in names():
                    self._sample(name)
                failed = False
            except Exception as error:  # the edge of a thread
                if not failed:
                    unexpected = not isinstance(error, ConvoyError | OSError)
                    log.warning("cannot sample the traffic: %s", error, exc_info=unexpected)
                failed = True

    def _sample(self, name: str) -> None:
        try:
            self.samples(name)
        except ModelNotReady as error:
            log.debug("%s", error)  # the model's page shows it


def figures(samples: Sequence[tuple[float, ServingStatus]]) -> Figures:
    """Requests a second, median time and errors, between each sample and the one before it."""
    latest_s, latest = samples[-1]
    rows: dict[str, list[Series]] = {"rate": [], "median": [], "errors": []}
    for role, version in (("champion", latest.champion), ("challenger", latest.challenger)):
        if version is None:
            continue
        for values, row in zip(_values(samples, version), rows.values(), strict=True):
            row.append(Series(role=role, version=version, values=values))
    return Figures(
        seconds=[round(at - latest_s, 1) for at, _ in samples[1:]],
        charts=[
            Chart(title="requests", unit="/s", series=rows["rate"]),
            Chart(title="median time", unit="ms", series=rows["median"]),
            Chart(title="errors", unit="%", series=rows["errors"]),
        ],
    )


def _values(
    samples: Sequence[tuple[float, ServingStatus]], version: int
) -> tuple[list[float | None], list[float | None], list[float | None]]:
    """Requests a second, the median in ms and errors in percent of ``version``."""
    rates: list[float | None] = []
    medians: list[float | None] = []
    errors: list[float | None] = []
    for (began, before), (ended, after) in pairwise(samples):
        change = after.of(version).since(before.of(version))
        median_s = change.quantile_s(0.5)
        rates.append(round(change.requests / (ended - began), 3))
        medians.append(None if median_s is None else round(1000 * median_s, 3))
        errors.append(round(100 * change.error_rate, 3))
    return rates, medians, errors
