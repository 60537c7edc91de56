"""``Tracer``: queues the records of sampled requests, and has their spans sent."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from service.observability.background_queue import BackgroundQueue
from service.observability.tracing.options import TracingOptions
from service.observability.tracing.trace_context import Sampling

if TYPE_CHECKING:
    from service.observability.request_record import RequestRecord


class Tracer:
    """Makes spans of finished requests in a thread, and sends them to the collector."""

    def __init__(self, options: TracingOptions, dropped: Callable[[int], None]) -> None:
        """Start to send spans. A process that forks must make its tracer after the fork.

        Args:
            options: where to, and for which requests.
            dropped: called with how many requests' spans could not be sent.
        """
        from service.observability.tracing.span_export import SpanExport

        self.sampling = Sampling(options)
        self._export = SpanExport(options, dropped)
        self.queue: BackgroundQueue[RequestRecord] = BackgroundQueue(
            "spans", self._export.send, options.max_queue, dropped
        )

    def close(self, timeout_s: float) -> None:
        """Send the spans that wait, for at most ``timeout_s``; the rest is lost."""
        ends = time.monotonic() + timeout_s
        self._export.wait_until(ends - timeout_s / 2)
        self.queue.close(timeout_s)
        self._export.close(max(0.0, ends - time.monotonic()))
