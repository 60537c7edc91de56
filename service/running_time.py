"""Tells the time in which this process ran from the time in which it was stopped."""

import time

STOPPED_S = 5.0


class RunningTime:
    """For a thread that looks every ``interval_s``: a look that comes 5 s late followed a stop.

    ``docker pause``, SIGSTOP and a sleeping machine stop a process, and ``time.monotonic`` goes on.
    """

    def __init__(self, interval_s: float) -> None:
        self._longest_s = interval_s + STOPPED_S
        self._looked_at: float | None = None
        self._since = 0.0

    def elapsed_s(self) -> float:
        """Seconds for which this process has run without a stop, at most since the first look."""
        now = time.monotonic()
        if self._looked_at is None or now - self._looked_at > self._longest_s:
            self._since = now
        self._looked_at = now
        return now - self._since
