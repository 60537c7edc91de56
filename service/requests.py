"""What every request gets: an id, a body under its limit, headers that say who answered."""

import re
import uuid

from flask import Flask, Response, abort, g, request

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# https://www.w3.org/TR/trace-context/: version-traceid-parentid-flags
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}.*"
)


def init_app(app: Flask) -> None:
    app.before_request(_begin)
    app.after_request(_finish)


def read_body() -> bytes:
    """The whole body; 400 when it is empty, 411 when its length is not said, 413 when too long.

    A chunked body has no length to check before it is read, and Flask cuts such a one silently at
    its limit, so it is refused.
    """
    require_length()
    body = request.get_data(cache=False)
    if not body:
        abort(400, "the body is empty; send the bytes of an image")
    return body


def require_length() -> None:
    """Refuse a body of unknown or forbidden length before a byte of it is read."""
    if request.content_length is None:
        if "Transfer-Encoding" in request.headers:
            abort(411, "send a Content-Length; chunked bodies are not accepted")
        abort(400, "the body is empty; send the bytes of an image")
    limit = request.max_content_length
    if limit is not None and request.content_length > limit:
        abort(413, f"the body has {request.content_length:,} bytes; at most {limit:,} are accepted")


def _begin() -> None:
    trace = _TRACEPARENT.fullmatch(request.headers.get("traceparent", ""))
    g.trace_id = trace[1] if trace else None
    asked = request.headers.get("X-Request-Id", "")
    g.request_id = asked if _SANE_ID.fullmatch(asked) else g.trace_id or uuid.uuid4().hex


def _finish(response: Response) -> Response:
    response.headers["X-Request-Id"] = g.request_id
    response.headers["X-Content-Type-Options"] = "nosniff"
    if served := g.get("served"):
        response.headers["X-Model-Version"] = str(served.version)
    return response
