"""The process that makes spans, as a thread of a test."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from service.observability.tracing.options import TracingOptions
from service.observability.tracing.process import receiver_at, relay
from service.observability.tracing.span_export import SpanExport


@contextmanager
def spans_process(
    address: Path, options: TracingOptions, dropped: Callable[[int], None] = lambda count: None
) -> Iterator[None]:
    """Makes the spans of the records that are sent to ``address``; the end sends them all."""
    export = SpanExport(options, dropped)
    reader, writer = os.pipe()
    with receiver_at(address) as receiver:
        thread = Thread(target=relay, args=(receiver, reader, export))
        thread.start()
        try:
            yield
        finally:
            os.close(writer)
            thread.join()
            os.close(reader)
            export.close(60)
