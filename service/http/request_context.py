"""Gives every request an id, and sets the headers of every answer.

It reads the WSGI environment itself, because classification requests do not pass through Flask.
"""

import random
import re
from typing import TYPE_CHECKING

from flask import Flask, Response, g, request

from service.state import state

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# https://www.w3.org/TR/trace-context/: version-traceid-parentid-flags
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}.*"
)
# Request ids are not secret, so they need no system call for secure random numbers.
_random = random.Random()  # noqa: S311
# For answers that are not pages: a browser must not load anything for them or put them in a frame.
DENY_ALL_POLICY = "default-src 'none'; frame-ancestors 'none'"


def init_app(app: Flask) -> None:
    """Give each Flask request an id, check its access, and set its answer's headers."""
    app.before_request(_begin)
    app.after_request(_finish)


def identify(environ: "WSGIEnvironment") -> tuple[str, str | None]:
    """The id of the request, and the id of its trace if it has one.

    The client may choose the request id: 1 to 64 letters, digits, ".", "_" or "-". Otherwise it is
    the trace id or a random one.
    """
    trace = _TRACEPARENT.fullmatch(environ.get("HTTP_TRACEPARENT", ""))
    trace_id = trace[1] if trace else None
    request_id = environ.get("HTTP_X_REQUEST_ID", "")
    if not _VALID_ID.fullmatch(request_id):
        request_id = trace_id or f"{_random.getrandbits(128):032x}"
    return request_id, trace_id


def answer_headers(request_id: str, version: int | None) -> list[tuple[str, str]]:
    """The headers of every answer; ``version`` is the model version that served it, if any."""
    headers = [("X-Request-Id", request_id), ("X-Content-Type-Options", "nosniff")]
    if version is not None:
        headers.append(("X-Model-Version", str(version)))
    return headers


def _begin() -> None:
    g.request_id, g.trace_id = identify(request.environ)
    state().access_control.admit_to_route(request.endpoint, request.environ)


def _finish(response: Response) -> Response:
    served = g.get("served")
    response.headers.update(answer_headers(g.request_id, served.version if served else None))
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers.setdefault("Content-Security-Policy", DENY_ALL_POLICY)
    return response
