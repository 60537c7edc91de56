"""``Tracer``: queues the records of sampled requests for the process that makes their spans."""

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from service.observability.background_queue import BackgroundQueue
from service.observability.request_record import RequestRecord
from service.observability.tracing.options import TracingOptions
from service.observability.tracing.trace_context import Sampling

BUFFER_BYTES = 400_000  # as much as Linux lets an unprivileged socket buffer
# How long to try again: the process may be starting, or busy.
RETRY_S = 1.0
INTERVAL_S = 0.05
_encode = msgspec.msgpack.encode


class Tracer:
    """Decides which requests are sampled; a thread sends their records to ``process.py``."""

    def __init__(
        self, options: TracingOptions, address: Path, dropped: Callable[[int], None]
    ) -> None:
        """Start the thread. A process that forks must make its tracer after the fork.

        Args:
            options: which requests are sampled, and how many of their records may wait.
            address: the socket of the process that makes the spans.
            dropped: called with how many records could not be sent there.
        """
        self.sampling = Sampling(options)
        self._feed = SpanFeed(address, dropped)
        self.queue: BackgroundQueue[RequestRecord] = BackgroundQueue(
            "spans", self._feed.send, options.max_queue, dropped
        )

    def close(self, timeout_s: float) -> None:
        """Send the records that wait, for at most ``timeout_s``; the rest is lost."""
        # If the process does not run, the other half is for counting the records.
        self._feed.wait_until(time.monotonic() + timeout_s / 2)
        self.queue.close(timeout_s)
        self._feed.close()


class SpanFeed:
    """Sends records to the process that makes their spans, as datagrams."""

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
        """From ``end`` on, a time of ``time.monotonic``, ``send`` waits no longer."""
        self._ends = end

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
