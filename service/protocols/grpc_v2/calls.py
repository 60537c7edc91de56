"""What each gRPC call has in common with an HTTP request: headers, access, id, and errors."""

from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote

import grpc

from service.http import problems
from service.http.request_context import identify

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

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
    """One call: its metadata as an HTTP server would have them, and its request id."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context
        self.environ = environ_of(context)
        self.request_id, self.trace_id = identify(self.environ)

    def fail(self, error: Exception) -> NoReturn:
        """End the call with the status for ``error``, as HTTP would answer it.

        Raises:
            Exception: always; grpcio stops the call with it.
        """
        problem = problems.describe(error, self.request_id)
        default = grpc.StatusCode.INVALID_ARGUMENT
        trailers = [("x-request-id", self.request_id)]
        if (retry_after_s := problems.retry_after_s(error)) is not None:
            trailers.append(("retry-after", str(retry_after_s)))
        self._context.set_trailing_metadata(tuple(trailers))
        error.__traceback__ = None  # its frames hold the request, and may hold the error
        self._context.abort(_CODES.get(problem.status, default), problem.detail)

    def succeed(self, version: int | None) -> None:
        """Set the metadata of an answer; ``version`` is the one that made it, if any."""
        sent = [("x-request-id", self.request_id)]
        if version is not None:
            sent.append(("x-model-version", str(version)))
        self._context.set_trailing_metadata(tuple(sent))


def environ_of(context: grpc.ServicerContext) -> "WSGIEnvironment":
    """The call's metadata under the names that CGI gives to headers (RFC 3875, 4.1.18)."""
    environ: dict[str, Any] = {"REMOTE_ADDR": _address(context.peer())}
    for key, value in context.invocation_metadata():
        if isinstance(value, str):
            environ["HTTP_" + key.upper().replace("-", "_")] = value
    return environ


def _address(peer: str) -> str:
    """The IP address in gRPC's name of a peer, such as ``ipv6:%5B::1%5D:4711``; else empty."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    return unquote(rest.rpartition(":")[0]).strip("[]")
