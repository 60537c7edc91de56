"""Tells the user on standard error how far a run is, and what it skips."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any, Self, TextIO

INTERVAL_S = 5.0


def warn(text: str, stream: TextIO | None = None) -> None:
    """Print ``text`` on standard error. If its disk is full, the run goes on without it."""
    stream = stream or sys.stderr
    try:
        print(text, file=stream, flush=True)
    except OSError:
        discard(stream)


def discard(stream: TextIO) -> None:
    """Write nowhere what ``stream`` still holds, or else Python's end would fail to write it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Progress:
    """Counts pictures, and shows a bar on a terminal, or else a line every few seconds."""

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._stream = stream or sys.stderr
        self._monotonic = monotonic
        self._started_s = self._shown_s = monotonic()
        self._done = 0
        self._failed = 0
        self._bar = _bar(total, self._stream) if self._stream.isatty() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, *, failed: bool = False) -> None:
        """Count one picture."""
        self._done += 1
        self._failed += failed
        if self._bar is not None:
            if failed:
                self._bar.set_postfix_str(f"{self._failed:,} failed", refresh=False)
            self._bar.update()
        elif self._monotonic() - self._shown_s >= INTERVAL_S:
            self._shown_s = self._monotonic()
            warn(self._line(), self._stream)

    def _line(self) -> str:
        rate = self._done / max(0.001, self._shown_s - self._started_s)
        return f"{self._done:,} of {self._total:,} pictures, {self._failed:,} failed, {rate:,.0f}/s"


def _bar(total: int, stream: TextIO) -> Any:
    """A bar of tqdm; None if that is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    # A narrow terminal cuts off the end of this: the times, and not the number of failures.
    form = (
        "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}, {rate_fmt}]"
    )
    return tqdm(total=total, unit="img", file=stream, bar_format=form, dynamic_ncols=True)
