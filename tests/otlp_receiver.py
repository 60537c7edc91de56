"""An OpenTelemetry collector for tests: it keeps the spans that it receives by OTLP/HTTP."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """What the receiver has received, and how it answers."""

    def __init__(self) -> None:
        self.port = 0
        self.paths: set[str] = set()
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.status = 200
        self.released = Event()
        """While it is not set, the receiver does not answer, like a collector that hangs."""
        self.released.set()
        self.asked = Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def take(self, path: str, body: bytes) -> None:
        message = ExportTraceServiceRequest.FromString(body)
        self.paths.add(path)
        for resource in message.resource_spans:
            self.resources.append(attributes(resource.resource.attributes))
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)

    def servers(self) -> list[Span]:
        """The spans of requests, in the order in which they began."""
        found = [each for each in self.spans if each.kind == Span.SPAN_KIND_SERVER]
        return sorted(found, key=lambda each: each.start_time_unix_nano)

    def children(self, parent: Span) -> list[Span]:
        """The spans below ``parent``, in the order in which they began."""
        found = [each for each in self.spans if each.parent_span_id == parent.span_id]
        return sorted(found, key=lambda each: (each.start_time_unix_nano, each.end_time_unix_nano))


def attributes(pairs: Any) -> dict[str, Any]:
    """The attributes of a span or a resource, which has texts and numbers."""

    def value(pair: KeyValue) -> Any:
        return getattr(pair.value, str(pair.value.WhichOneof("value")))

    return {pair.key: value(pair) for pair in pairs}


@contextmanager
def running_collector() -> Iterator[Collector]:
    """A collector on a free port."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.asked.set()
            collector.released.wait(60)
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if collector.status == 200:
                collector.take(self.path, body)
            self.send_response(collector.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    collector.port = server.server_port
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        collector.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
