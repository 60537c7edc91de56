"""Decides whether a request is sent again, and when. No input or output happens here."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime

import httpx

from convoy_client.errors import ConvoyError, InvalidAnswer, Timeout
from convoy_client.exchange import MAX_ANSWER_BYTES, Reply, failure_of

FIRST_WAIT_S, MAX_WAIT_S = 0.25, 10.0
MIN_TIMEOUT_S = 0.001


@dataclass(frozen=True, slots=True)
class Clock:
    """The time and the random numbers that decisions use; tests pass their own."""

    monotonic: Callable[[], float] = time.monotonic
    unix: Callable[[], float] = time.time
    random: Callable[[], float] = random.random


SYSTEM_CLOCK = Clock()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long, and how often, a request is tried.

    Attributes:
        timeout_s: seconds for one try: to connect, to send, and until the answer is complete.
        deadline_s: seconds for all tries and the waits between them.
        retries: how often a request is sent again, 0 or more.
    """

    timeout_s: float
    deadline_s: float
    retries: int
    clock: Clock = SYSTEM_CLOCK

    def __post_init__(self) -> None:
        for name in ("timeout_s", "deadline_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.retries < 0:
            raise ValueError(f"retries is {self.retries}; it must be 0 or more")

    def begin(self, url: str) -> "Attempts":
        """The tries of one request, whose deadline begins now."""
        return Attempts(self, url)


class Attempts:
    """The tries of one request."""

    def __init__(self, policy: RetryPolicy, url: str) -> None:
        self._policy = policy
        self._url = url
        self._clock = policy.clock
        self._ends_s = self._clock.monotonic() + policy.deadline_s
        self._retries = 0

    def begin_try(self) -> "Try":
        """The next try, which ends at the deadline at the latest."""
        left_s = self._ends_s - self._clock.monotonic()
        return Try(max(MIN_TIMEOUT_S, min(self._policy.timeout_s, left_s)), self._clock, self._url)

    def wait_after_s(self, failure: ConvoyError) -> float:
        """Seconds to wait before the next try.

        Waits double from ``FIRST_WAIT_S`` to ``MAX_WAIT_S``. Each is multiplied by a random number
        below 1, so that clients that failed together do not return together. The time that
        ``Retry-After`` asks for is added.

        Raises:
            ConvoyError: ``failure``, if the request must not be sent again.
        """
        if not failure.is_transient or self._retries >= self._policy.retries:
            raise failure
        longest_s: float = min(MAX_WAIT_S, FIRST_WAIT_S * 2**self._retries)
        wait_s = (failure.retry_after_s or 0.0) + longest_s * self._clock.random()
        if self._clock.monotonic() + wait_s >= self._ends_s:
            raise failure
        self._retries += 1
        return wait_s


class Try:
    """Collects the answer to one request that was sent."""

    def __init__(self, timeout_s: float, clock: Clock, url: str) -> None:
        self.timeout_s = timeout_s
        self._clock = clock
        self._url = url
        self._ends_s = clock.monotonic() + timeout_s
        self._body = bytearray()

    def add(self, chunk: bytes) -> None:
        """Take a part of the body. httpx alone would wait for ``timeout_s`` between any two parts.

        Raises:
            Timeout: the answer takes too long.
            InvalidAnswer: the answer is longer than any answer of a service.
        """
        self._body += chunk
        if len(self._body) > MAX_ANSWER_BYTES:
            raise InvalidAnswer(f"{self._url} answers with more than {MAX_ANSWER_BYTES:,} bytes")
        if self._clock.monotonic() > self._ends_s:
            raise Timeout(f"no answer from {self._url} in time (it arrives too slowly)")

    def reply(self, status: int, headers: httpx.Headers) -> Reply:
        """The complete answer.

        Raises:
            ConvoyError: the answer reports an error.
        """
        reply = Reply(status, headers, bytes(self._body))
        if (failure := failure_of(reply, self._url)) is None:
            return reply
        failure.retry_after_s = retry_after_s(headers, self._clock.unix())
        raise failure


def retry_after_s(headers: Mapping[str, str], now_unix_s: float) -> float | None:
    """The seconds that ``Retry-After`` asks for; None if there is not a valid one.

    The header has whole seconds or a date (RFC 9110, section 10.2.3). A date counts from the
    answer's own ``Date`` if it has one, because the clocks of two machines may differ.
    """
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    until = _unix_s(text)
    if until is None:
        return None
    sent = _unix_s(headers.get("date", ""))
    return max(0.0, until - (now_unix_s if sent is None else sent))


def _unix_s(date: str) -> float | None:
    try:
        found = parsedate_to_datetime(date)
    except (ValueError, TypeError, OverflowError):
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
