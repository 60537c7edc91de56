"""``TraceContext``: to which trace a request belongs, and whether its spans are recorded."""

import random
import re

from msgspec import Struct

from service.observability.tracing.options import TracingOptions

# https://www.w3.org/TR/trace-context/: version-traceid-parentid-flags. Version 00 has no more
# fields; a later one may have some.
_TRACEPARENT = re.compile(
    r"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)
_SAMPLED = 1
_RATIO_BITS = 64
# Trace Context asks a service to pass on at least this many characters of ``tracestate``. A longer
# one is left out.
MAX_STATE_CHARACTERS = 512
# Trace ids are not secret, so they need no system call for secure random numbers.
_random = random.Random()  # noqa: S311


class TraceContext(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The trace of one request.

    Attributes:
        trace_id: 32 hexadecimal digits; empty if the request belongs to no trace.
        parent_id: the caller's span, 16 hexadecimal digits; empty if this service begins the trace.
        state: the caller's ``tracestate``.
        sampled: whether spans of the request are recorded.
    """

    trace_id: str = ""
    parent_id: str = ""
    state: str = ""
    sampled: bool = False


def parse_traceparent(text: str) -> tuple[str, str, bool] | None:
    """Trace id, parent span's id and the flag ``sampled`` of a header; None if it is malformed."""
    found = _TRACEPARENT.fullmatch(text) if text else None
    if found is None:
        return None
    trace_id, parent_id, flags = found.groups()
    return trace_id, parent_id, bool(int(flags, 16) & _SAMPLED)


class Sampling:
    """Decides which requests are traced, as the samplers of OpenTelemetry's SDK do.

    Every request needs this decision. This class does not call the SDK's sampler, which takes a
    context object that costs more than the decision.
    """

    def __init__(self, options: TracingOptions) -> None:
        self._follows_caller = options.follows_caller
        self._continues_trace = options.continues_trace
        # Like TraceIdRatioBased: a trace is sampled if the lower half of its id is below this.
        self._bound = round(options.share * 2**_RATIO_BITS)

    def context(self, traceparent: str, tracestate: str, own_id: str | None) -> TraceContext | None:
        """The context of a request that is sampled; None for any other request.

        Args:
            traceparent: the header; empty if the request has none.
            tracestate: the header that belongs to it.
            own_id: the id for a trace that begins here, 32 random hexadecimal digits; None to make
                one.
        """
        caller = parse_traceparent(traceparent) if self._continues_trace else None
        if caller is None:
            trace_id = own_id or f"{_random.getrandbits(128):032x}"
            if int(trace_id[16:], 16) >= self._bound:
                return None
            return TraceContext(trace_id=trace_id, sampled=True)
        trace_id, parent_id, sampled = caller
        if not self._follows_caller:
            sampled = int(trace_id[16:], 16) < self._bound
        if not sampled:
            return None
        state = tracestate if len(tracestate) <= MAX_STATE_CHARACTERS else ""
        return TraceContext(trace_id=trace_id, parent_id=parent_id, state=state, sampled=True)
