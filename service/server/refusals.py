"""``RefusalQueue``: sends errors at a limited rate, so that they cannot take up the processor.

An error costs about 0.25 ms. Clients that retry at once would take processor time from clients that
are served. So a worker sends at most ``REFUSALS_PER_S`` errors a second, and delays the others.
"""

import time
from collections import deque
from collections.abc import Iterator

from service.server.sockets.connection import Connection

REFUSALS_PER_S = 400
REFUSALS_AT_ONCE = 100
# A refusal costs one more for every so many bytes that the client has sent or goes on to send.
# Without that, eight clients with 4 MB each took half of the machine (reliability.md, row 14).
BYTES_PER_REFUSAL = 256 * 1024
# Bytes that clients send after a refusal use up at most this share of the refusals that become
# available, so that one fast sender cannot delay all errors of other clients.
DISCARDED_SHARE = 0.75


class RefusalQueue:
    """The errors that wait to be sent, in their order."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Connection, bytes, float]] = deque()
        self._credit, self._credited_at = float(REFUSALS_AT_ONCE), time.monotonic()
        self._discarded_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, connection: Connection, data: bytes, size: int) -> None:
        """Queue ``data``, which refuses a request of ``size`` bytes."""
        connection.hold()
        self._waiting.append((connection, data, 1 + size / BYTES_PER_REFUSAL))

    def count_discarded(self, count: int) -> None:
        """Note that a client went on to send ``count`` bytes after its last answer."""
        self._discarded_bytes += count

    def due(self, now: float) -> Iterator[tuple[Connection, bytes]]:
        """The connections that may get their error ``now``, each with the error."""
        earned = (now - self._credited_at) * REFUSALS_PER_S
        earned -= min(self._discarded_bytes / BYTES_PER_REFUSAL, DISCARDED_SHARE * earned)
        self._discarded_bytes, self._credited_at = 0, now
        self._credit = min(REFUSALS_AT_ONCE, self._credit + earned)
        while self._waiting and self._credit >= 1:
            connection, data, price = self._waiting.popleft()
            if connection.is_held:  # it was not closed to make room
                # The lower limit bounds how long one costly refusal delays the next.
                self._credit = max(-REFUSALS_AT_ONCE, self._credit - price)
                yield connection, data
