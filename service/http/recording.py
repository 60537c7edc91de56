"""Describes finished HTTP requests for the recorder, by OpenTelemetry's conventions for HTTP.

Source: "Semantic conventions for HTTP spans" 1.37, status stable.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from service.http.openapi import Operation
from service.observability.request_record import Attributes, FinishedRequest

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# Other methods are the client's text; the conventions have ``_OTHER`` for them.
METHODS = frozenset(
    ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
)
SERVER_ERROR = 500
# Python's int raises ValueError for thousands of digits, which a client may send.
_LENGTH = re.compile(r"[0-9]{1,15}")
# A client's text is cut, so that 16 records fit into a datagram (``tracing.tracer``).
MAX_PATH_BYTES = 2_000
MAX_NAME_CHARACTERS = 200


def finished(
    environ: "WSGIEnvironment",
    request_id: str,
    route: str | None,
    started: float,
    status: int,
    response_bytes: int,
    error: Exception | None = None,
) -> FinishedRequest:
    """Describe a request whose answer is made; ``protocol`` and ``model_name`` are not set.

    Args:
        environ: the WSGI environment.
        request_id: the id that the client got.
        route: the template of the path; None if the path is not a route.
        started: when the request arrived, by ``time.perf_counter``.
        status: the status of the answer.
        response_bytes: the size of the body of the answer.
        error: why the request failed, if it did.
    """
    method, length = environ["REQUEST_METHOD"], environ.get("CONTENT_LENGTH") or ""
    failure = None
    if status >= SERVER_ERROR:
        failure = str(status) if error is None else type(error).__name__
    return FinishedRequest(
        request_id=request_id,
        name=f"{method if method in METHODS else 'HTTP'} {route or ''}".strip(),
        method=method,
        path=environ["PATH_INFO"][:MAX_PATH_BYTES],
        status=status,
        attributes=_attributes(environ, route, status),
        started=started,
        request_bytes=int(length) if _LENGTH.fullmatch(length) else 0,
        response_bytes=response_bytes,
        error=failure,
    )


def _attributes(environ: "WSGIEnvironment", route: str | None, status: int) -> Attributes:
    method = environ["REQUEST_METHOD"]
    found: Attributes = {
        "http.request.method": method if method in METHODS else "_OTHER",
        "http.response.status_code": status,
        "url.scheme": environ["wsgi.url_scheme"],
        "network.protocol.version": environ["SERVER_PROTOCOL"].rpartition("/")[2],
        # The socket's own address: a client could write anything into the header Host.
        "server.address": environ["SERVER_NAME"],
    }
    if environ["SERVER_PORT"].isdecimal():
        found["server.port"] = int(environ["SERVER_PORT"])
    if route is not None:
        found["http.route"] = route
    return found


class RouteTemplates:
    """The templates of the paths that take images, such as ``/v1/models/{name}/classify``.

    Spans have the template, because the path itself has text of the client.
    """

    def __init__(self, operations: Iterable[Operation], others: Iterable[str]) -> None:
        """``others`` are further paths, which are their own templates."""
        templates = {each.path for each in operations if each.body} | set(others)
        self._patterns = [
            (each, re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(each)) + "/?"))
            for each in sorted(templates)
        ]

    def find(self, path: str) -> str | None:
        """The template of ``path``, or None."""
        return next((each for each, known in self._patterns if known.fullmatch(path)), None)
