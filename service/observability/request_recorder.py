"""``RequestRecorder``: records each finished request for its trace and the access log.

A protocol describes a finished request, after its answer is made. The recorder then queues one
record for the spans of its trace, and for its line in the access log. Threads write both.

    recorder = state.recorder  # None if the service records nothing
    if recorder:
        recorder.record(environ, request_id, job, lambda: FinishedRequest(…))
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from service.inference.requests import Job
from service.observability.access_log import AccessLog
from service.observability.request_record import FinishedRequest, RequestRecord
from service.observability.tracing.trace_context import TraceContext, parse_traceparent
from service.observability.tracing.tracer import Tracer

log = logging.getLogger(__name__)

ERROR_INTERVAL_S = 60.0


class RequestRecorder:
    """Records requests for the tracer and the access log. Any thread may call any method."""

    def __init__(
        self,
        tracer: Tracer | None,
        access_log: AccessLog | None,
        describe_client: Callable[[dict[str, Any]], tuple[str, str | None]],
    ) -> None:
        """Record for the ``tracer`` and the ``access_log``; either may be None.

        ``describe_client`` returns the address of the client that sent a request, and the name of
        its token if it sent a known one.
        """
        self.tracer = tracer
        self.access_log = access_log
        self._describe_client = describe_client
        self._next_error = 0.0

    def record(
        self,
        environ: dict[str, Any],
        request_id: str,
        job: Job | None,
        describe: Callable[[], FinishedRequest],
        may_trace: bool = True,
    ) -> None:
        """Queue the request's spans if it is sampled, and its line if there is an access log.

        An exception does not reach the caller, who has an answer to send. It is logged, at most
        once a minute.

        Args:
            environ: the request's headers and ``REMOTE_ADDR`` by their names in CGI (RFC 3875).
            request_id: if the service made it at random, it is the trace's id, too.
            job: the pipeline's job, if the request got that far.
            describe: returns the request with its answer; called if the request is recorded.
            may_trace: whether the request may have spans.
        """
        try:
            if trace := self._select(environ, request_id, may_trace):
                self._queue(trace, environ, job, describe())
        except Exception:  # the edge of a request, whose answer is made
            if (now := time.monotonic()) >= self._next_error:
                self._next_error = now + ERROR_INTERVAL_S
                log.exception("cannot record request %s", request_id)

    def _select(
        self, environ: dict[str, Any], request_id: str, may_trace: bool
    ) -> TraceContext | None:
        """The trace of a request to record; None if the request is not recorded."""
        traceparent = environ.get("HTTP_TRACEPARENT", "")
        if self.tracer is not None and may_trace:
            own_id = None if traceparent or "HTTP_X_REQUEST_ID" in environ else request_id
            state = environ.get("HTTP_TRACESTATE", "")
            if context := self.tracer.sampling.context(traceparent, state, own_id):
                return context
        if self.access_log is None:
            return None
        caller = parse_traceparent(traceparent)
        return TraceContext(trace_id=caller[0] if caller else "")

    def _queue(
        self,
        trace: TraceContext,
        environ: dict[str, Any],
        job: Job | None,
        request: FinishedRequest,
    ) -> None:
        served = job.served if job else None
        client, token = self._describe_client(environ) if self.access_log else ("", None)
        record = RequestRecord(
            request=request,
            ended=time.perf_counter(),
            trace=trace,
            client=client,
            token=token,
            model_name=served.name if served else request.model_name,
            model_version=served.version if served else None,
            plan=served.plan if served else None,
            answered=job.answered if job else None,
        )
        if self.tracer is not None and trace.sampled:
            self.tracer.queue.put(record)
        if self.access_log is not None:
            self.access_log.queue.put(record)

    def close(self, timeout_s: float) -> None:
        """Write the lines and send the spans that wait, for at most ``timeout_s``."""
        ends = time.monotonic() + timeout_s
        if self.access_log is not None:
            self.access_log.queue.close(timeout_s)
        if self.tracer is not None:
            self.tracer.close(max(0.0, ends - time.monotonic()))
