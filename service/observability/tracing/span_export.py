"""``SpanExport``: makes OpenTelemetry spans of records, and sends them by OTLP.

This module alone imports the SDK. A span is made with the SDK's ``ReadableSpan``, because the
request is over and every time is known. A span that the SDK's tracer starts and ends costs twelve
times as much (docs/decisions/0023).
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from threading import Thread

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)

from service.observability.request_record import Attributes, RequestRecord
from service.observability.tracing.options import TracingOptions
from service.observability.tracing.trace_context import TraceContext

log = logging.getLogger(__name__)

DEFAULT_SERVICE_NAME = "convoy"
ROOM_INTERVAL_S = 0.05
LOG_INTERVAL_S = 60.0
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class SpanExport:
    """Makes spans of records, and hands them to the SDK's ``BatchSpanProcessor``."""

    def __init__(self, options: TracingOptions, dropped: Callable[[int], None]) -> None:
        """Start the SDK's thread; ``dropped`` is called with how many requests it could not send.

        The SDK reads the other variables itself: ``OTEL_EXPORTER_OTLP_…``, ``OTEL_BSP_…`` and
        ``OTEL_RESOURCE_ATTRIBUTES``.
        """
        _log_at_most_once_a_minute()
        own = Resource({SERVICE_NAME: DEFAULT_SERVICE_NAME})
        wanted = own.merge(OTELResourceDetector().detect())
        self._resource = OwnResource(Resource.create(wanted.attributes).attributes)
        self._scope = InstrumentationScope("convoy")
        self._ids = RandomIdGenerator()
        self._dropped = dropped
        self._exporter = CountingExporter(OTLPSpanExporter(endpoint=options.endpoint), dropped)
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=options.max_queue,
            max_export_batch_size=options.max_batch,
        )
        self._max_queue = options.max_queue
        self._handed = 0

    def send(self, records: Sequence[RequestRecord], gives_up: Callable[[], bool]) -> None:
        """Hand the spans of ``records`` to the SDK; waits while its queue is full.

        Its queue would otherwise drop the oldest spans without counting them. When ``gives_up()``
        is true, this waits no longer: it drops the requests without room, and counts them.
        """
        epoch_s = time.time() - time.perf_counter()
        for record in records:
            spans = list(self._spans(record, epoch_s))
            if not self._wait_for_room(len(spans), gives_up):
                self._dropped(1)
                continue
            self._handed += len(spans)
            for span in spans:
                self._processor.on_end(span)

    def close(self, timeout_s: float) -> None:
        """Send the spans that the SDK holds, for at most ``timeout_s``."""
        thread = Thread(target=self._processor.shutdown, name="last spans", daemon=True)
        thread.start()  # the SDK itself would wait up to 30 s
        thread.join(timeout_s)

    def _wait_for_room(self, count: int, gives_up: Callable[[], bool]) -> bool:
        """Whether the SDK's queue has room for ``count`` spans, perhaps after a while."""
        while (waiting := self._handed - self._exporter.taken) and (
            waiting + count > self._max_queue
        ):
            if gives_up():
                return False
            time.sleep(ROOM_INTERVAL_S)
        return True

    def _spans(self, record: RequestRecord, epoch_s: float) -> Iterator[ReadableSpan]:
        """The server span of a request, and a child for each of its stages."""
        state = _trace_state(record.trace.state)
        trace_id = int(record.trace.trace_id, 16)

        def span(
            name: str,
            parent: SpanContext | None,
            times: tuple[float, float],
            attributes: Attributes | None = None,
            kind: SpanKind = SpanKind.INTERNAL,
            status: Status = Status(),  # noqa: B008 - never changed
        ) -> ReadableSpan:
            own_id = self._ids.generate_span_id()
            start_ns, end_ns = (int((each + epoch_s) * 1e9) for each in times)
            return ReadableSpan(
                name=name,
                context=SpanContext(trace_id, own_id, False, _SAMPLED, state),
                parent=parent,
                resource=self._resource,
                attributes=attributes,
                kind=kind,
                status=status,
                start_time=start_ns,
                end_time=end_ns,
                instrumentation_scope=self._scope,
            )

        server = span(
            record.request.name,
            _parent(record.trace, state),
            (record.request.started, record.ended),
            attributes_of(record),
            SpanKind.SERVER,
            Status(StatusCode.ERROR) if record.request.error else Status(),
        )
        yield server
        for stage, started, ended in record.answered.stages() if record.answered else ():
            yield span(stage, server.context, (started, ended))


class OwnResource(Resource):
    """The resource of all spans.

    The exporter takes its hash for every span, which costs 6 microseconds with the SDK's class.
    """

    def __hash__(self) -> int:
        return hash(id(self))

    def __eq__(self, other: object) -> bool:
        return self is other


class CountingExporter(SpanExporter):
    """An exporter that counts the spans that it has taken, and those that it could not send."""

    def __init__(self, exporter: SpanExporter, dropped: Callable[[int], None]) -> None:
        self._exporter = exporter
        self._dropped = dropped
        self.taken = 0
        """How many spans left the queue of the ``BatchSpanProcessor``."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send ``spans``; if that fails, count the requests that they belong to."""
        self.taken += len(spans)
        try:
            result = self._exporter.export(spans)
        except Exception:  # the edge of the SDK's thread
            log.exception("cannot send spans")
            result = SpanExportResult.FAILURE
        if result is not SpanExportResult.SUCCESS:
            self._dropped(sum(each.kind is SpanKind.SERVER for each in spans))
        return result

    def shutdown(self) -> None:
        """Send no more spans."""
        self._exporter.shutdown()


def attributes_of(record: RequestRecord) -> Attributes:
    """The attributes of a server span: those of its protocol, and ours under ``convoy.``."""
    request = record.request
    found: Attributes = {**request.attributes, "convoy.request_id": request.request_id}
    if request.protocol:
        found["convoy.protocol"] = request.protocol
    if record.model_name and record.model_version is not None:  # else the name is the client's text
        found["convoy.model.name"] = record.model_name
        found["convoy.model.version"] = str(record.model_version)
        found["convoy.plan"] = record.plan or ""
    if record.answered:
        found["convoy.images"] = record.answered.images
        found["convoy.batch_size"] = record.answered.batch_size
    if request.error:
        found["error.type"] = request.error
    return found


def _parent(trace: TraceContext, state: TraceState) -> SpanContext | None:
    if not trace.parent_id:
        return None
    return SpanContext(int(trace.trace_id, 16), int(trace.parent_id, 16), True, _SAMPLED, state)


def _trace_state(header: str) -> TraceState:
    """The caller's ``tracestate``; empty if it is malformed."""
    return TraceState.from_header([header]) if header else TraceState()


def _log_at_most_once_a_minute() -> None:
    """Have the SDK log at most one line a minute, however often it fails."""
    sdk = logging.getLogger("opentelemetry")
    sdk.propagate = False
    sdk.handlers = [_RareHandler()]
    # It logs each malformed ``tracestate``, which is a text that clients choose.
    logging.getLogger("opentelemetry.trace.span").setLevel(logging.CRITICAL)


class _RareHandler(logging.Handler):
    """Passes on at most one warning a minute."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._next = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Log the record's message as this module's, unless it comes too soon."""
        if (now := time.monotonic()) >= self._next:
            self._next = now + LOG_INTERVAL_S
            log.warning("cannot send spans: %s", record.getMessage())
