"""``SpanFeed``: sends a worker's records to the process that makes their spans."""

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from service.observability.request_record import RequestRecord

BUFFER_BYTES = 400_000  # as much as Linux lets an unprivileged socket buffer
# How long to try again: that process may be starting, or busy.
RETRY_S = 1.0
INTERVAL_S = 0.05
_encode = msgspec.msgpack.encode


class SpanSink(Protocol):
    """Takes the records of sampled requests, in the thread that empties their queue."""

    def send(self, records: Sequence[RequestRecord]) -> None:
        """Take ``records``. May wait a while; then drops and counts those that it cannot send."""

    def wait_until(self, end: float) -> None:
        """From ``end`` on, a time of ``time.monotonic``, ``send`` waits no longer."""

    def close(self, timeout_s: float) -> None:
        """Send the records that it has taken, for at most ``timeout_s``."""


class SpanFeed:
    """A ``SpanSink`` that sends the records as datagrams."""

    def __init__(self, address: Path, dropped: Callable[[int], None]) -> None:
        """``dropped`` is called with how many records could not be sent to ``address``."""
        self._address = str(address)
        self._dropped = dropped
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        self._ends = float("inf")

    def send(self, records: Sequence[RequestRecord]) -> None:
        """Send ``records`` as one datagram; waits up to ``RETRY_S`` for its receiver."""
        data = _encode(records)
        ends = time.monotonic() + RETRY_S
        while True:
            try:
                self._socket.sendto(data, self._address)
            except OSError:
                if time.monotonic() >= min(ends, self._ends):
                    self._dropped(len(records))
                    return
                time.sleep(INTERVAL_S)
            else:
                return

    def wait_until(self, end: float) -> None:
        """As ``SpanSink.wait_until``."""
        self._ends = end

    def close(self, timeout_s: float) -> None:
        """Close the socket; all records have been sent or dropped."""
        self._socket.close()
