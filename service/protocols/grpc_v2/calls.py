"""What each gRPC call has in common with an HTTP request: headers, access, id, and errors."""

import contextlib
import time
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError, Message

from registry.core.errors import InvalidTensor
from service.http import problems
from service.http.recording import MAX_NAME_CHARACTERS
from service.http.request_context import identify
from service.inference.requests import Job
from service.observability.request_record import FinishedRequest
from service.protocols.grpc_v2 import inference_pb2 as pb
from service.protocols.grpc_v2.message_size import MAX_HEAD_BYTES, check_infer_request
from service.state import State

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

AnyMessage = TypeVar("AnyMessage", bound=Message)

SERVICE = "inference.GRPCInferenceService"
PROTOCOL = "grpc"
PROBES = {"Check", "ServerLive", "ServerReady", "ModelReady"}
# gRPC sends the details as metadata, which have a limit of 8 KB.
MAX_DETAIL_CHARACTERS = 1000
# HTTP status of the table of errors → gRPC's status; by default INVALID_ARGUMENT for 4xx.
_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class Call:
    """One call: its metadata as an HTTP server would have them, its request id, and its record."""

    def __init__(self, name: str, context: grpc.ServicerContext, state: State) -> None:
        """Begin the call ``name``; the recorder of the ``state`` gets it when it ends."""
        self._name = name
        self._context = context
        self._state = state
        self._received_bytes = 0
        self.started = self.received = time.perf_counter()
        self.environ = environ_of(context)
        self.request_id = identify(self.environ)
        self.model_name: str | None = None
        """What the message says, as soon as it has arrived."""
        self.job: Job | None = None
        """The pipeline's job, if the call got that far."""

    def parse(self, kind: type[AnyMessage], data: bytes) -> AnyMessage:
        """The call's message.

        Raises:
            InvalidTensor: ``data`` is not a message of this ``kind``.
        """
        self._received_bytes = len(data)
        self.received = time.perf_counter()
        if kind is pb.ModelInferRequest:
            check_infer_request(data, self._state.settings.max_json_bytes)
        elif len(data) > MAX_HEAD_BYTES:
            raise InvalidTensor(f"the message has more than {MAX_HEAD_BYTES:,} bytes")
        try:
            message = kind.FromString(data)
        except DecodeError as error:
            raise InvalidTensor(f"the message is not a {kind.__name__}: {error}") from None
        name = getattr(message, "model_name", None) or getattr(message, "name", None)
        self.model_name = name or None
        return message

    def check_client_waits(self) -> None:
        """Return if the client still waits for the answer.

        Raises:
            grpc.RpcError: it has given the call up.
        """
        if not self._context.is_active():
            with contextlib.suppress(Exception):  # without it, grpcio would log what is raised here
                self._context.abort(grpc.StatusCode.CANCELLED, "")
            raise grpc.RpcError

    def give_up(self) -> None:
        """Record that the client has given the call up."""
        self._record(grpc.StatusCode.CANCELLED, 0, None)

    def fail(self, error: Exception) -> NoReturn:
        """End the call with the status for ``error``, as HTTP would answer it.

        Raises:
            Exception: always; grpcio stops the call with it.
        """
        problem = problems.describe(error, self.request_id)
        code = _CODES.get(problem.status, grpc.StatusCode.INVALID_ARGUMENT)
        trailers = [("x-request-id", self.request_id)]
        if (retry_after_s := problems.retry_after_s(error)) is not None:
            trailers.append(("retry-after", str(retry_after_s)))
        self._context.set_trailing_metadata(tuple(trailers))
        failed = type(error).__name__ if problem.status >= 500 else None
        self._record(code, 0, failed)
        error.__traceback__ = None  # its frames hold the request, and may hold the error
        self._context.abort(code, problem.detail[:MAX_DETAIL_CHARACTERS])

    def succeed(self, message: Message) -> bytes:
        """The answer ``message`` as bytes, with its metadata set."""
        sent = [("x-request-id", self.request_id)]
        if self.job and self.job.served:
            sent.append(("x-model-version", str(self.job.served.version)))
        self._context.set_trailing_metadata(tuple(sent))
        answer = message.SerializeToString()
        self._record(grpc.StatusCode.OK, len(answer), None)
        return answer

    def _record(self, code: grpc.StatusCode, response_bytes: int, failed: str | None) -> None:
        """Record the call, by OpenTelemetry's conventions for gRPC; probes are not recorded."""
        recorder = self._state.recorder
        if recorder is None or self._name in PROBES:
            return

        def describe() -> FinishedRequest:
            method, number = f"{SERVICE}/{self._name}", int(code.value[0])
            return FinishedRequest(
                request_id=self.request_id,
                name=method,
                method=self._name,
                path=f"/{method}",
                status=number,
                attributes={
                    "rpc.system": "grpc",
                    "rpc.service": SERVICE,
                    "rpc.method": self._name,
                    "rpc.grpc.status_code": number,
                },
                started=self.started,
                request_bytes=self._received_bytes,
                response_bytes=response_bytes,
                protocol=PROTOCOL if self._name == "ModelInfer" else "",
                model_name=self.model_name[:MAX_NAME_CHARACTERS] if self.model_name else None,
                error=failed,
            )

        recorder.record(self.environ, self.request_id, self.job, describe)


def environ_of(context: grpc.ServicerContext) -> "WSGIEnvironment":
    """The call's metadata under the names that CGI gives to headers (RFC 3875, 4.1.18)."""
    environ: dict[str, Any] = {"REMOTE_ADDR": _address(context.peer())}
    for key, value in context.invocation_metadata():
        # "x_forwarded_for" would get the name of "x-forwarded-for", which only a proxy may set.
        if isinstance(value, str) and "_" not in key:
            name = "HTTP_" + key.upper().replace("-", "_")
            environ[name] = f"{environ[name]},{value}" if name in environ else value
    return environ


def _address(peer: str) -> str:
    """The IP address in gRPC's name of a peer, such as ``ipv6:%5B::1%5D:4711``; else empty."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    return unquote(rest.rpartition(":")[0]).strip("[]")
