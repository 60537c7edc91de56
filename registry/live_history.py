"""How a model was served in the last minutes, sampled while somebody looks, drawn as curves."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from threading import Lock, Thread

from msgspec import Struct

from registry.errors import ModelNotReady
from registry.live import Live

log = logging.getLogger(__name__)

SAMPLE_S = 2.0
SAMPLES = 150
WATCHED_S = 60.0
WIDTH, HEIGHT = 320, 90


class Curve(Struct, frozen=True, kw_only=True):
    """One drawing: for each of champion and challenger the SVG points, and its last value."""

    title: str
    unit: str
    top: float
    lines: tuple[tuple[str, str, float | None], ...]
    """Role, points, last value."""


class LiveHistory:
    """Samples of the models that were asked for within the last minute, in a thread of its own."""

    def __init__(self, read: Callable[[str], Live]) -> None:
        self._read = read
        self._samples: dict[str, deque[tuple[float, Live]]] = {}
        self._asked_at: dict[str, float] = {}
        self._lock = Lock()
        self._thread: Thread | None = None

    def samples(self, name: str) -> list[tuple[float, Live]]:
        """What was sampled of ``name`` so far, oldest first; asking keeps the sampling going.

        Raises:
            ModelNotReady: the services do not say, and never did lately.
        """
        with self._lock:
            self._asked_at[name] = time.monotonic()
            if name not in self._samples:
                first = time.monotonic(), self._read(name)
                self._samples[name] = deque([first], maxlen=SAMPLES)
            if self._thread is None or not self._thread.is_alive():
                self._thread = Thread(target=self._run, name="live", daemon=True)
                self._thread.start()
            return list(self._samples[name])

    def _run(self) -> None:
        while True:
            time.sleep(SAMPLE_S)
            with self._lock:
                now = time.monotonic()
                for name in [n for n, at in self._asked_at.items() if now - at > WATCHED_S]:
                    del self._asked_at[name]
                    self._samples.pop(name, None)
                names = list(self._samples)
                if not names:
                    self._thread = None
                    return
            for name in names:
                try:
                    live = self._read(name)
                except ModelNotReady as error:
                    log.debug("%s", error)
                    continue
                with self._lock:
                    if name in self._samples:
                        self._samples[name].append((time.monotonic(), live))


def curves(samples: Sequence[tuple[float, Live]]) -> list[Curve]:
    """Requests a second, median time, and errors between two samples each, of both versions."""
    latest = samples[-1][1]
    roles = {"champion": latest.champion, "challenger": latest.challenger}
    found: dict[tuple[str, str], list[float | None]] = {}
    for (began, before), (ended, after) in pairwise(samples):
        for role, version in roles.items():
            if version is not None:
                change = after.of(version).since(before.of(version))
                rate = change.requests / (ended - began)
                median_s = change.quantile_s(0.5)
                found.setdefault(("requests", role), []).append(rate)
                found.setdefault(("median", role), []).append(median_s and 1000 * median_s)
                found.setdefault(("errors", role), []).append(100 * change.error_rate)
    return [
        _curve(title, unit, {role: found.get((key, role), []) for role in roles})
        for key, title, unit in (
            ("requests", "requests", "/s"),
            ("median", "median time", "ms"),
            ("errors", "errors", "%"),
        )
    ]


def _curve(title: str, unit: str, values: dict[str, list[float | None]]) -> Curve:
    top = max([each for row in values.values() for each in row if each], default=0.0) or 1.0
    lines = []
    for role, row in values.items():
        points = " ".join(
            f"{WIDTH * (place + SAMPLES - len(row)) / SAMPLES:.1f},"
            f"{HEIGHT * (1 - 0.9 * value / top):.1f}"
            for place, value in enumerate(row)
            if value is not None
        )
        lines.append((role, points, row[-1] if row else None))
    return Curve(title=title, unit=unit, top=top, lines=tuple(lines))
