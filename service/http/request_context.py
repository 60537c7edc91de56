"""Gives every request an id, and sets the headers of every answer.

It reads the WSGI environment itself, because classification requests do not pass through Flask.
"""

import random
import re
import time
from typing import TYPE_CHECKING

from flask import Flask, Response, g, request

from service.http.recording import finished
from service.observability.request_record import FinishedRequest
from service.observability.tracing.trace_context import parse_traceparent
from service.state import state

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Request ids are not secret, so they need no system call for secure random numbers.
_random = random.Random()  # noqa: S311
# For answers that are not pages: a browser must not load anything for them or put them in a frame.
DENY_ALL_POLICY = "default-src 'none'; frame-ancestors 'none'"
# The endpoints that tell whether the service or a version is alive or ready. Their requests are not
# recorded, because orchestrators send them every few seconds.
UNRECORDED = frozenset(
    {
        *("health.livez", "health.readyz"),
        *("mlflow_scoring.ping", "mlflow_scoring.health"),
        *("openinference.live", "openinference.server_ready", "openinference.model_ready"),
    }
)
# Requests for these are in the access log, but have no spans.
UNTRACED = frozenset({"health.metrics", "static"})


def init_app(app: Flask) -> None:
    """Give each Flask request an id, check its access, and set its answer's headers."""
    app.before_request(_begin)
    app.after_request(_finish)


def probe_paths(app: Flask) -> frozenset[str]:
    """The paths that answer whether the service is alive or ready."""
    rules = (each for each in app.url_map.iter_rules() if each.endpoint in UNRECORDED)
    return frozenset(each.rule for each in rules if not each.arguments)


def identify(environ: "WSGIEnvironment") -> str:
    """The id of the request.

    The client may choose it: 1 to 64 letters, digits, ".", "_" or "-". Otherwise it is
    the trace id or a random one.
    """
    request_id: str = environ.get("HTTP_X_REQUEST_ID", "")
    if _VALID_ID.fullmatch(request_id):
        return request_id
    caller = parse_traceparent(environ.get("HTTP_TRACEPARENT", ""))
    return caller[0] if caller else f"{_random.getrandbits(128):032x}"


def answer_headers(request_id: str, version: int | None) -> list[tuple[str, str]]:
    """The headers of every answer; ``version`` is the model version that served it, if any."""
    headers = [("X-Request-Id", request_id), ("X-Content-Type-Options", "nosniff")]
    if version is not None:
        headers.append(("X-Model-Version", str(version)))
    return headers


def _begin() -> None:
    g.started = time.perf_counter()
    g.request_id = identify(request.environ)
    state().access_control.admit_to_route(request.endpoint, request.environ)


def _finish(response: Response) -> Response:
    served = g.get("served")
    response.headers.update(answer_headers(g.request_id, served.version if served else None))
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers.setdefault("Content-Security-Policy", DENY_ALL_POLICY)
    _record(response)
    return response


def _record(response: Response) -> None:
    """Record the request unless it is a probe."""
    recorder, rule = state().recorder, request.url_rule
    if recorder is None or request.endpoint in UNRECORDED:
        return

    def describe() -> FinishedRequest:
        route, size = rule.rule if rule else None, response.content_length or 0
        status = response.status_code
        return finished(request.environ, g.request_id, route, g.started, status, size)

    may_trace = request.method != "OPTIONS" and request.endpoint not in UNTRACED
    recorder.record(request.environ, g.request_id, None, describe, may_trace)
