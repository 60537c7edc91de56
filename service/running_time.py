"""Measures how long this process has run without being stopped."""

import time

STOPPED_S = 5.0


class RunningTime:
    """Measures running time for a thread that calls ``elapsed_s`` every ``interval_s``.

    ``docker pause``, SIGSTOP and a sleeping machine stop a process, while ``time.monotonic`` goes
    on. A call that comes ``STOPPED_S`` late means that the process was stopped.
    """

    def __init__(self, interval_s: float) -> None:
        self._longest_s = interval_s + STOPPED_S
        self._called_at: float | None = None
        self._since = 0.0

    def elapsed_s(self) -> float:
        """Seconds for which this process has run without a stop, counted from the first call."""
        now = time.monotonic()
        if self._called_at is None or now - self._called_at > self._longest_s:
            self._since = now
        self._called_at = now
        return now - self._since
