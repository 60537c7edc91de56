"""``MlflowScoring``: ``POST /invocations`` and ``POST /v1/models/{name}/invocations``."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
from flask import Response
from werkzeug.exceptions import abort

from registry.core.errors import ConvoyError, InvalidImage, UnsupportedImageType
from service.http import problems
from service.http.bodies.json_body import images_of
from service.http.bodies.reading import check_coding, json_buffer, media_type, raw_image
from service.http.openapi import Operation
from service.inference.requests import Result, Target
from service.protocols.inference_app import HttpAnswer
from service.protocols.mlflow_scoring.operations import (
    OPERATIONS,
    Predictions,
    ScoredImage,
    ScoringError,
)
from service.protocols.mlflow_scoring.tables import texts_in_csv, texts_in_json
from service.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# Clients of ``mlflow.deployments`` send to /endpoints/NAME/invocations.
_PATH = re.compile(
    r"(?:/endpoints/(?P<endpoint>[^/]+)|/v1/models/(?P<name>[^/]+)"
    r"(?:/versions/(?P<version>[0-9]{1,9})|/aliases/(?P<alias>[^/]+))?)?/invocations/?"
)
# SageMaker's clients send the bytes of a picture, most with application/x-image.
_RAW = {"application/octet-stream", "application/x-image"}
# HTTP status → error code, as MLflow's REST API has them.
_CODES = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "RESOURCE_DOES_NOT_EXIST",
    429: "REQUEST_LIMIT_EXCEEDED",
    500: "INTERNAL_ERROR",
    503: "TEMPORARILY_UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_encode = msgspec.json.Encoder().encode


class MlflowScoring:
    """Translates ``/invocations``; ``predict_route`` is a further path for the default model."""

    name = "mlflow"
    methods: tuple[str, ...] = ("POST",)
    operations: tuple[Operation, ...] = OPERATIONS

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def match(self, path: str) -> Target | None:
        """The target of a path that ends in ``/invocations``; None for other paths."""
        if path == self._settings.predict_route:
            return Target()
        found = _PATH.fullmatch(path) if "/invocations" in path else None
        if found is None:
            return None
        endpoint, name, version, alias = found.groups()
        return Target(endpoint or name, int(version) if version else None, alias)

    def read(self, environ: "WSGIEnvironment") -> "ScoringRequest":
        """The request, whose body is read when its images are iterated."""
        return ScoringRequest(environ, self._settings)

    def refuse(self, error: Exception, request_id: str) -> Response:
        """A ``ScoringError``. A bad image gets 400, like any bad input to MLflow's server."""
        problem = problems.describe(error, request_id)
        response = problems.respond(problem, error)
        if isinstance(error, InvalidImage | UnsupportedImageType):
            response.status_code = 400
        default = "BAD_REQUEST" if response.status_code < 500 else "INTERNAL_ERROR"
        code = _CODES.get(response.status_code, default)
        response.data = _encode(ScoringError(code, problem.detail, request_id))
        response.mimetype = "application/json"
        return response


class ScoringRequest:
    """One request. Its body is read when its images are iterated."""

    isolates_errors = False
    """An error of one image fails the whole request, as on MLflow's server."""

    def __init__(self, environ: "WSGIEnvironment", settings: Settings) -> None:
        self._environ = environ
        self._settings = settings

    def __iter__(self) -> Iterator[bytes | ConvoyError]:
        environ, settings = self._environ, self._settings
        check_coding(environ)
        kind = media_type(environ)
        if kind in _RAW or kind.startswith("image/"):
            return iter((raw_image(environ, settings),))
        _check_parameters(environ["CONTENT_TYPE"] if kind else "")
        body = json_buffer(environ, settings)
        if kind == "application/json":
            texts, has_escapes = texts_in_json(body, settings.max_batch)
        elif kind == "text/csv":
            texts, has_escapes = texts_in_csv(body, settings.max_batch), False
        else:
            abort(
                415,
                f"Content-Type {kind[:80]!r} is not accepted; send application/json, text/csv, or "
                "the image itself (image/* or application/octet-stream)",
            )
        return images_of(texts, has_escapes, settings.max_image_bytes)

    def write(self, result: Result, request_id: str) -> HttpAnswer:
        """The rows that the version's python_function gives, under ``predictions``."""
        labels = result.served.manifest.labels
        rows = []
        for each in result.rows():
            best = int(each.argmax())
            rows.append(ScoredImage(labels[best], best, float(each[best]), each.tolist()))
        return HttpAnswer(_encode(Predictions(rows)))


def _check_parameters(content_type: str) -> None:
    """Answer 415 if the Content-Type has another parameter than ``charset=utf-8``."""
    for parameter in content_type.split(";")[1:]:
        name, _, value = parameter.strip().partition("=")
        if name.lower() != "charset" or value.strip('"').lower() != "utf-8":
            abort(
                415,
                f"the Content-Type has {parameter.strip()[:40]!r}; only charset=utf-8 is accepted",
            )
