"""Records of finished requests, which wait until a thread writes their spans and lines."""

from msgspec import Struct

from service.inference.requests import AnsweredRequest
from service.observability.tracing.trace_context import TraceContext

Attributes = dict[str, str | int]


class FinishedRequest(Struct, frozen=True, kw_only=True):
    """A request with its answer, as its protocol describes it.

    It holds no body, no pixels and no headers, because it may wait in a queue. It has many fields
    because the span and the line need them.

    Attributes:
        request_id: the id that the client got.
        name: the name of the server span, without any text of a client: ``POST /v1/classify``, or
            ``inference.GRPCInferenceService/ModelInfer``.
        method: the HTTP method, or the call's name.
        path: the path as the client sent it.
        status: the HTTP or gRPC status code that the client got.
        attributes: the server span's, by the semantic conventions of the protocol.
        started: when the request arrived, by ``time.perf_counter``.
        request_bytes: the size of its body.
        response_bytes: the size of the body of the answer.
        protocol: the name in the metrics; empty if this was not a classification.
        model_name: the model that the client asked for; None for the default model.
        error: the type of the error; only if the service failed, which is a status of 5xx in HTTP.
    """

    request_id: str
    name: str
    method: str
    path: str
    status: int
    attributes: Attributes
    started: float
    request_bytes: int = 0
    response_bytes: int = 0
    protocol: str = ""
    model_name: str | None = None
    error: str | None = None


class RequestRecord(Struct, frozen=True, kw_only=True):
    """A request in the queue of the tracer or of the access log.

    Attributes:
        request: as its protocol described it.
        ended: when the request ended, by ``time.perf_counter``.
        trace: the trace that it belongs to.
        client: the address of the client.
        token: the name of its token, if it sent a known one.
        model_name: the name of the model that the pipeline chose, or else the one asked for.
        model_version: the version that the pipeline chose; None if it chose none.
        plan: the plan of that version.
        answered: the times of its stages, if it got predictions.
    """

    request: FinishedRequest
    ended: float
    trace: TraceContext
    client: str
    token: str | None
    model_name: str | None
    model_version: int | None
    plan: str | None
    answered: AnsweredRequest | None
