"""How a model was served in the last minutes, sampled while somebody looks, drawn as curves."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from threading import Lock

from msgspec import Struct

from registry.canary.traffic_stats import ServingStatus

SAMPLE_S = 1.5
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


class TrafficHistory:
    """Samples of each model that somebody looks at: taken when it is asked for, so by the pages."""

    def __init__(self, read: Callable[[str], ServingStatus]) -> None:
        self._read = read
        self._samples: dict[str, deque[tuple[float, ServingStatus]]] = {}
        self._locks: dict[str, Lock] = {}

    def samples(self, name: str) -> list[tuple[float, ServingStatus]]:
        """What was sampled of ``name``, oldest first, the last within two seconds.

        Raises:
            ModelNotReady: the services do not say.
        """
        with self._locks.setdefault(name, Lock()):  # samples come in the order of their clocks
            rows = self._samples.get(name, deque(maxlen=SAMPLES))
            now = time.monotonic()
            if rows and now - rows[-1][0] > WATCHED_S:
                rows.clear()  # nobody has looked for so long that one line over it would be a lie
            if not rows or now - rows[-1][0] >= SAMPLE_S:
                rows.append((now, self._read(name)))
            self._samples[name] = rows
            return list(rows)


def curves(samples: Sequence[tuple[float, ServingStatus]]) -> list[Curve]:
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
