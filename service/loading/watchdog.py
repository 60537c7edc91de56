"""Ends a worker that cannot serve any more, so that gunicorn starts another.

gunicorn notices a worker whose loop stands still; not one whose threads wait for a forward pass
that never ends, nor one that grows. What the allocator has kept is given back; the restart for the
sake of memory is the last resort, before the kernel's, which would lose what is being answered.
"""

import logging
import math
import os
import random
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from threading import Thread

from service.loading.model_slot import ModelSlot
from service.malloc import trim_heap
from service.running_time import RunningTime

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.5
# Between saying so in /readyz and the end: proxies look every second or two.
UNREADY_S = 2.0
# So that the workers of a service, which grow alike, do not end together.
JITTER_S = 60.0
# What is given back and taken again costs time: every 5 s, odd pictures showed in others' p99.
TRIM_S = 30.0
_STATM = Path("/proc/self/statm")


class Watchdog:
    """Looks after the models of one worker."""

    def __init__(
        self,
        slots: Collection[ModelSlot],
        forward_timeout_s: float,
        max_rss_mb: int | None = None,
        end: Callable[[signal.Signals], object] = lambda number: os.kill(os.getpid(), number),
    ) -> None:
        """No forward pass takes ``forward_timeout_s``. Without ``max_rss_mb`` there is no limit."""
        self.reason: str | None = None
        """Why this worker is about to end."""
        self._slots = slots
        self._hung_s = forward_timeout_s
        self._max_rss_mb = math.inf if max_rss_mb is None else max_rss_mb
        self._end = end
        self._restart_at: float | None = None
        self._trim_at = 0.0
        self._running_time = RunningTime(POLL_INTERVAL_S)

    def start(self) -> None:
        """Look from a daemon thread from now on."""

        def watch() -> None:
            while True:
                time.sleep(POLL_INTERVAL_S)
                try:
                    self.poll_once()
                except Exception:  # the edge of a thread: no descriptor free must not end it
                    log.exception("the watchdog could not look")

        Thread(target=watch, name="watchdog", daemon=True).start()

    def poll_once(self) -> None:
        """End this process if it has to; with SIGKILL when it hangs, else as gunicorn would."""
        ran_s = self._running_time.elapsed_s()
        for slot in self._slots:
            if min(slot.running_s, ran_s) > self._hung_s:  # a stop's time is not the pass's
                self._end_hung(slot)
        now, rss = time.monotonic(), rss_mb()
        if now >= self._trim_at or rss > self._max_rss_mb:
            trim_heap()
            self._trim_at, rss = now + TRIM_S, rss_mb()
        if rss <= self._max_rss_mb:
            self._restart_at = None
        else:
            if self._restart_at is None:
                self._restart_at = now + random.uniform(0, JITTER_S)  # noqa: S311 - no secret
                log.warning("%d MB of memory, over %g: ending soon", rss, self._max_rss_mb)
            if now >= self._restart_at:
                self._restart_at = float("inf")
                self._end(signal.SIGTERM)

    def _end_hung(self, slot: ModelSlot) -> None:
        """Say so, then end this worker; unless the pass ends while that is being said."""
        running_s = slot.running_s
        self.reason = f"{slot.ref.name}: a forward pass has not ended for {running_s:.0f} s"
        log.critical("%s; this worker ends", self.reason)
        time.sleep(UNREADY_S)
        if slot.running_s > running_s and self._running_time.elapsed_s() > self._hung_s:
            self._end(signal.SIGKILL)
        else:
            log.warning("%s: the forward pass has ended; this worker goes on", slot.ref.name)
            self.reason = None


def rss_mb() -> int:
    """This process's resident memory, in MiB."""
    pages = int(_STATM.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20
