"""What every request gets: an id, a body under its limit, headers that say who answered.

Reads the WSGI environment itself: the route that classifies does not go through Flask.
"""

import random
import re
from mmap import mmap
from typing import TYPE_CHECKING

from flask import Flask, Response, g, request
from werkzeug.exceptions import abort

from service.state import state

if TYPE_CHECKING:
    from _typeshed.wsgi import InputStream, WSGIEnvironment

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# https://www.w3.org/TR/trace-context/: version-traceid-parentid-flags
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}.*"
)
# An id names a request, it guards nothing: a system call for each would be for nothing.
_random = random.Random()  # noqa: S311
# What is no page loads nothing and is framed by nobody, whatever a browser takes it for.
NO_PAGE = "default-src 'none'; frame-ancestors 'none'"
_LENGTH = re.compile(r"[0-9]{1,15}")


def init_app(app: Flask) -> None:
    app.before_request(_begin)
    app.after_request(_finish)


def identify(environ: "WSGIEnvironment") -> tuple[str, str | None]:
    """The request's id, the caller's own when it is a sane token, and its trace's id if any."""
    trace = _TRACEPARENT.fullmatch(environ.get("HTTP_TRACEPARENT", ""))
    trace_id = trace[1] if trace else None
    asked = environ.get("HTTP_X_REQUEST_ID", "")
    if not _SANE_ID.fullmatch(asked):
        asked = trace_id or f"{_random.getrandbits(128):032x}"
    return asked, trace_id


def answer_headers(request_id: str, version: int | None) -> list[tuple[str, str]]:
    """The headers of every answer; ``version`` where one was looked up."""
    headers = [("X-Request-Id", request_id), ("X-Content-Type-Options", "nosniff")]
    if version is not None:
        headers.append(("X-Model-Version", str(version)))
    return headers


def body_length(environ: "WSGIEnvironment", limit: int, advice: str = "") -> int:
    """The length of the body as the caller says it, checked before a byte is read.

    ``advice`` ends the text of the 413.

    Raises:
        HTTPException: 411 when the body is chunked, so that its length is unknown; 413 when it is
            over ``limit``; 400 when there is no body.
    """
    if "HTTP_TRANSFER_ENCODING" in environ:
        abort(411, "send a Content-Length; chunked bodies are not accepted")
    text = environ.get("CONTENT_LENGTH", "")
    if not _LENGTH.fullmatch(text):
        abort(400, "the body is empty; send the bytes of an image")
    length = int(text)
    if length > limit:
        abort(413, f"the body has {length:,} bytes; at most {limit:,} are accepted{advice}")
    return length


def read_body(stream: "InputStream", length: int) -> bytes:
    """The whole body; 400 when it is empty or ends before the length that was said."""
    body: bytes = stream.read(length)
    if len(body) != length:
        abort(400, f"the body ended after {len(body):,} of {length:,} bytes")
    if not body:
        abort(400, "the body is empty; send the bytes of an image")
    return body


def body_buffer(stream: "InputStream | mmap", length: int) -> bytes | mmap:
    """As ``read_body``, without a copy where the worker has the body in pages of its own."""
    return stream if isinstance(stream, mmap) else read_body(stream, length)


def _begin() -> None:
    g.request_id, g.trace_id = identify(request.environ)
    state().access_control.admit_to_route(request.endpoint, request.environ)


def _finish(response: Response) -> Response:
    served = g.get("served")
    response.headers.update(answer_headers(g.request_id, served.version if served else None))
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers.setdefault("Content-Security-Policy", NO_PAGE)
    return response
