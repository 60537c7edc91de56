"""Turns every error into an answer in problem JSON (RFC 9457), by one table.

Each body also has the member ``error``, which clients of the Open Inference Protocol read.
"""

import logging
from typing import Any

from flask import Flask, Response, g
from werkzeug.exceptions import HTTPException

from registry.core import errors as domain
from registry.core.problem_details import Problem

log = logging.getLogger(__name__)

# Error → (status, outcome in the metrics).
TABLE: dict[type[domain.ConvoyError], tuple[int, str]] = {
    domain.InvalidImage: (422, "client_error"),
    domain.InvalidTensor: (400, "client_error"),
    domain.UnsupportedImageType: (415, "client_error"),
    domain.UnsupportedEncoding: (415, "client_error"),
    domain.ImageTooLarge: (413, "client_error"),
    domain.ModelNotFound: (404, "client_error"),
    domain.VersionNotFound: (404, "client_error"),
    domain.TokenMissing: (401, "client_error"),
    domain.TokenInsufficient: (403, "client_error"),
    domain.RateExceeded: (429, "client_error"),
    domain.Overloaded: (503, "overload"),
    domain.DeadlineExceeded: (504, "overload"),
    domain.ModelNotReady: (503, "unavailable"),
    domain.TokensUnavailable: (503, "unavailable"),
    domain.DeviceLost: (503, "unavailable"),
}
RETRY_AFTER_S: dict[type[Exception], int] = {
    domain.ModelNotReady: 2,
    domain.TokensUnavailable: 2,
    domain.DeviceLost: 2,
}


def init_app(app: Flask) -> None:
    """Answer every error of a Flask view, HTTP errors included, in problem JSON."""
    app.register_error_handler(Exception, lambda error: answer(error, g.request_id))


def answer(error: Exception, request_id: str) -> Response:
    """The response for ``error``: 500 if it is not in ``TABLE``, and then it is logged."""
    return respond(describe(error, request_id), error)


def respond(problem: Problem, error: Exception) -> Response:
    """The response with the ``problem`` of ``error``, and the headers that it needs."""
    response = problem.answer(error)
    if (after_s := retry_after_s(error)) is not None:
        response.headers["Retry-After"] = str(after_s)
    if isinstance(error, domain.UnsupportedEncoding):
        response.headers["Accept-Encoding"] = "identity"  # RFC 9110, section 15.5.16
    return response


def retry_after_s(error: Exception) -> int | None:
    """After how many seconds a retry may succeed; None if the error does not depend on time."""
    return getattr(error, "retry_after_s", None) or RETRY_AFTER_S.get(type(error))


def describe(error: Exception, request_id: str) -> Problem:
    """The problem JSON for ``error``; logs an error that is a defect of the service."""
    if isinstance(error, HTTPException):
        status, title = error.code or 500, error.name
        detail = error.description or title
    elif isinstance(error, domain.ConvoyError) and type(error) in TABLE:
        status, _ = TABLE[type(error)]
        title = type(error).title()
        detail = ": ".join([*getattr(error, "__notes__", ()), str(error)])
    else:
        log.error("unexpected error", exc_info=error, extra={"request_id": request_id})
        status, title = 500, "internal error"
        detail = f"the service failed to answer; tell its operator the request id {request_id}"
    return Problem.of(status, title, detail, request_id)


def outcome(error: Exception) -> str:
    """The outcome that ``error`` counts as in the metrics: one of their ``OUTCOMES``."""
    if isinstance(error, HTTPException):
        return "client_error" if (error.code or 500) < 500 else "server_error"
    if not isinstance(error, domain.ConvoyError):
        return "server_error"
    return TABLE.get(type(error), (500, "server_error"))[1]


def as_item(error: Exception, request_id: str) -> dict[str, Any]:
    """The ``error`` entry of one image of several."""
    problem = describe(error, request_id)
    return {"type": problem.type, "status": problem.status, "detail": problem.detail}
