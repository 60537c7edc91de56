"""``Tracer``: queues the records of sampled requests, and has their spans sent."""

import time
from collections.abc import Callable
from pathlib import Path

from service.observability.background_queue import BackgroundQueue
from service.observability.request_record import RequestRecord
from service.observability.tracing.feed import SpanFeed, SpanSink
from service.observability.tracing.options import TracingOptions
from service.observability.tracing.trace_context import Sampling


class Tracer:
    """Decides which requests are sampled, and queues their records for a thread."""

    def __init__(
        self,
        options: TracingOptions,
        dropped: Callable[[int], None],
        process_address: Path | None = None,
    ) -> None:
        """Start to send spans. A process that forks must make its tracer after the fork.

        Args:
            options: where to send spans, and for which requests.
            dropped: called with how many requests' spans could not be sent.
            process_address: the socket of the process that makes the spans; without one, this
                process makes them.
        """
        self.sampling = Sampling(options)
        self._sink = _sink(options, dropped, process_address)
        self.queue: BackgroundQueue[RequestRecord] = BackgroundQueue(
            "spans", self._sink.send, options.max_queue, dropped
        )

    def close(self, timeout_s: float) -> None:
        """Send the spans that wait, for at most ``timeout_s``; the rest is lost."""
        ends = time.monotonic() + timeout_s
        self._sink.wait_until(ends - timeout_s / 2)
        self.queue.close(timeout_s)
        self._sink.close(max(0.0, ends - time.monotonic()))


def _sink(
    options: TracingOptions, dropped: Callable[[int], None], process_address: Path | None
) -> SpanSink:
    if process_address is not None:
        return SpanFeed(process_address, dropped)
    from service.observability.tracing.span_export import SpanExport  # imports OpenTelemetry

    return SpanExport(options, dropped)
