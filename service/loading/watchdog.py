"""``Watchdog``: ends a worker that can no longer serve, so that gunicorn starts another.

gunicorn notices a worker whose loop hangs. It does not notice one whose threads wait for a forward
pass that never ends, nor one whose memory grows. Against growth, the watchdog first returns freed
memory to the kernel, and as a last resort restarts the worker. If the kernel killed the worker
instead, the requests in progress would be lost.
"""

import logging
import math
import os
import random
import signal
import time
from collections.abc import Callable, Collection
from threading import Thread

from service.loading.model_slot import ModelSlot
from service.memory import rss_mb, trim_heap
from service.running_time import RunningTime

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.5
# How long /readyz reports the reason before the worker ends: proxies poll it every second or two.
UNREADY_S = 2.0
# The workers of a service grow alike; a random delay up to this keeps them from ending together.
JITTER_S = 60.0
# Returning memory and taking it again costs time: with an interval of 5 s, unusual pictures raised
# the p99 of other requests.
TRIM_S = 30.0


class Watchdog:
    """Checks the forward passes and the memory of one worker."""

    def __init__(
        self,
        slots: Collection[ModelSlot],
        forward_timeout_s: float,
        max_rss_mb: int | None = None,
        end: Callable[[signal.Signals], object] = lambda number: os.kill(os.getpid(), number),
    ) -> None:
        """Create a watchdog; ``start`` makes it run.

        Args:
            slots: the models of this worker.
            forward_timeout_s: a forward pass that takes longer is taken to hang.
            max_rss_mb: the most resident memory in MiB; None for no limit.
            end: sends a signal to this process.
        """
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
        """Check every ``POLL_INTERVAL_S`` from a daemon thread."""

        def watch() -> None:
            while True:
                time.sleep(POLL_INTERVAL_S)
                try:
                    self.poll_once()
                except Exception:  # the edge of a thread: a lack of descriptors must not end it
                    log.exception("the watchdog's check failed")

        Thread(target=watch, name="watchdog", daemon=True).start()

    def poll_once(self) -> None:
        """End this process if it hangs (SIGKILL) or has too much memory (SIGTERM)."""
        ran_s = self._running_time.elapsed_s()
        for slot in self._slots:
            if min(slot.running_s, ran_s) > self._hung_s:  # a stopped process computes nothing
                self._end_hung(slot)
        now, rss = time.monotonic(), rss_mb()
        if now >= self._trim_at or rss > self._max_rss_mb:
            trim_heap()
            self._trim_at, rss = now + TRIM_S, rss_mb()
        if rss <= self._max_rss_mb:
            self._restart_at = None
        else:
            if self._restart_at is None:
                self._restart_at = now + random.uniform(0, JITTER_S)  # noqa: S311 - not a secret
                log.warning(
                    "this worker has %d MB of memory, more than CONVOY_MAX_RSS_MB=%g; it ends soon",
                    rss,
                    self._max_rss_mb,
                )
            if now >= self._restart_at:
                self._restart_at = float("inf")
                self._end(signal.SIGTERM)

    def _end_hung(self, slot: ModelSlot) -> None:
        """Report the reason for ``UNREADY_S``, then end this worker if the pass still runs."""
        running_s = slot.running_s
        self.reason = f"{slot.ref.name}: a forward pass has not ended for {running_s:.0f} s"
        log.critical("%s; this worker ends", self.reason)
        time.sleep(UNREADY_S)
        if slot.running_s > running_s and self._running_time.elapsed_s() > self._hung_s:
            self._end(signal.SIGKILL)
        else:
            log.warning("%s: the forward pass has ended; this worker continues", slot.ref.name)
            self.reason = None
