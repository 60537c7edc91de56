"""Buckets that the services of several machines share, in a Redis; without it, each has its own."""

import contextlib
import logging
import time
from typing import Protocol

from registry.errors import UsageError

log = logging.getLogger(__name__)

# A request waits for it, and in the loop all others do.
TIMEOUT_S = 0.05
# An answer that takes longer is used, and the last for a while.
SLOW_S = 0.025
# For so long a Redis that failed, or is slow, is not asked again.
PAUSE_S = 5.0
# By the clock of the Redis: those of the machines may differ.
TAKE = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local full_at = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now)
local wait = full_at - now - burst
if wait > 0 then return wait end
full_at = full_at + interval
redis.call('SET', KEYS[1], string.format('%.0f', full_at), 'PX', math.ceil((full_at - now) / 1000))
return 0
"""


class Takes(Protocol):
    """What keeps callers to their rate."""

    def take(self, caller: str) -> float:
        """0 if ``caller`` may ask now; else the seconds after which it may."""
        ...


class SharedBuckets:
    """As ``door.Buckets``, over one Redis for all."""

    def __init__(self, url: str, rate: float, burst: int, own: Takes) -> None:
        """``own`` serves while the Redis does not answer: it must not decide who is served.

        Raises:
            UsageError: this is no address of a Redis, or its client is not installed.
        """
        try:
            import redis
        except ImportError as error:
            raise UsageError("CONVOY_RATE_STORE needs Redis's client: the extra redis") from error
        try:
            client = redis.Redis.from_url(
                url,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=None,
                retry_on_timeout=False,
            )
        except ValueError as error:
            raise UsageError(f"CONVOY_RATE_STORE is no address of a Redis: {error}") from error
        self._failures = (redis.RedisError, OSError)
        self._script = client.register_script(TAKE)
        self._interval_us = round(1e6 / rate)
        self._burst_us = (burst - 1) * self._interval_us
        self._own = own
        self._down_until = 0.0
        with contextlib.suppress(*self._failures):  # not in the first request's time
            client.script_load(TAKE)

    def take(self, caller: str) -> float:
        began = time.monotonic()
        if began < self._down_until:
            return self._own.take(caller)
        try:
            wait_us = self._script(
                keys=[f"convoy:rate:{caller}"], args=[self._interval_us, self._burst_us]
            )
        except self._failures as error:
            self._leave_alone(str(error))
            return self._own.take(caller)
        if (took_s := time.monotonic() - began) > SLOW_S:
            self._leave_alone(f"it takes {1000 * took_s:.0f} ms")
        return int(wait_us) / 1e6

    def _leave_alone(self, reason: str) -> None:
        log.warning("the Redis of the rates is not asked for %g s: %s", PAUSE_S, reason)
        self._down_until = time.monotonic() + PAUSE_S
