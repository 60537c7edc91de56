"""``OpenInference``: ``POST /v2/models/{name}[/versions/{version}]/infer``."""

import re
from typing import TYPE_CHECKING

from flask import Response

from service.http import problems
from service.http.openapi import Operation
from service.inference.requests import Target
from service.protocols.openinference.infer_request import InferRequest
from service.protocols.openinference.operations import OPERATIONS
from service.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_PATH = re.compile(r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer/?")
_NUMBER = re.compile(r"[0-9]{1,9}")


class OpenInference:
    """Translates inference requests; see docs/clients.md."""

    name = "v2"
    methods: tuple[str, ...] = ("POST",)
    operations: tuple[Operation, ...] = OPERATIONS

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def match(self, path: str) -> Target | None:
        """The target of an inference request; None for other paths.

        A version that is not a number is an alias.
        """
        found = _PATH.fullmatch(path) if path.startswith("/v2/models/") else None
        return target(found["name"], found["version"]) if found else None

    def read(self, environ: "WSGIEnvironment") -> InferRequest:
        """The request, whose body is read when its images are iterated."""
        return InferRequest(environ, self._settings)

    def refuse(self, error: Exception, request_id: str) -> Response:
        """As ``error_answer``."""
        return error_answer(error, request_id)


def error_answer(error: Exception, request_id: str) -> Response:
    """Problem JSON, which has the member ``error`` that the protocol asks for.

    KServe's client reads it only if the Content-Type is application/json.
    """
    response = problems.answer(error, request_id)
    response.mimetype = "application/json"
    return response


def target(name: str, version: str | None) -> Target:
    """The model and the version or alias that a client named; empty stands for the default."""
    if version and _NUMBER.fullmatch(version):
        return Target(name or None, int(version))
    return Target(name or None, alias=version or None)
