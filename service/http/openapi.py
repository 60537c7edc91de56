"""The OpenAPI 3.1 description of the service, generated from the records of its answers.

A test compares it with the routes. Each protocol describes its own operations.
"""

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from registry.canary.traffic_stats import ServingStatus
from registry.core.problem_details import Problem, responses
from service.http import models
from service.http.health import READINESS_EXAMPLE, Readiness
from service.http.models import ModelDetails, ModelList

FAILURES = {
    "400": "The request is malformed.",
    "401": "The token is missing or unknown: send Authorization: Bearer TOKEN.",
    "403": "The token's role does not permit this.",
    "404": "The service does not serve this model, version or alias.",
    "408": "The request did not arrive in time.",
    "411": "The body is chunked: send Content-Length instead.",
    "413": "Too many bytes, pixels or images.",
    "415": (
        "The image is not a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM, or the body is compressed "
        "(Content-Encoding)."
    ),
    "422": "The image cannot be decoded.",
    "429": "The client sends more requests than its rate limit allows; see Retry-After.",
    "431": "The head of the request is too long.",
    "500": "An unexpected error in the service; the body has the request's id.",
    "503": "Too many images wait, no version is loaded, or tokens cannot be read; see Retry-After.",
    "504": "The image was not scored before its deadline.",
}
ABOUT_MODELS = ("401", "403", "404", "503")
BINARY = {"type": "string", "format": "binary"}
_BASE64 = {"type": "string", "contentEncoding": "base64"}
_JSON_IMAGES = (
    {"type": "object", "required": ["image"], "properties": {"image": _BASE64}},
    {
        "type": "object",
        "required": ["images"],
        "properties": {"images": {"type": "array", "items": _BASE64}},
    },
)
_PARAMETERS: dict[str, dict[str, Any]] = {
    "name": {
        "description": "Name of a served model.",
        "schema": {"type": "string"},
        "example": "fashion",
    },
    "version": {
        "description": "Number of the version.",
        "schema": {"type": "integer"},
        "example": 1,
    },
    "alias": {
        "description": "Alias that chose the version.",
        "schema": {"type": "string"},
        "example": "champion",
    },
}


class Body(Struct, frozen=True, kw_only=True):
    """What an operation takes.

    Attributes:
        content: media type → the type of its record, or its JSON schema.
        command: the start of a command line that sends ``picture.png``; the address follows.
        maker: the function of ``static/docs.js`` that makes such a body from pictures.
    """

    content: dict[str, Any]
    command: str = "curl -s --data-binary @picture.png"
    maker: str = "images"


class Operation(Struct, frozen=True, kw_only=True):
    """One method of one path.

    Attributes:
        path: the path, with its parameters in braces.
        answer: the type of the JSON in a 200; None for text.
        example: an answer of the type ``answer``, or text if that is None.
        method: the HTTP method in lower case.
        body: what the request's body is; None without one.
        query: the parameters of the query, as OpenAPI describes them.
        failures: further statuses, with problem details as their body.
        failure_answers: further statuses, with the same type of answer as a 200.
    """

    path: str
    summary: str
    example: Any
    answer: Any = None
    method: str = "get"
    body: Body | None = None
    query: tuple[dict[str, Any], ...] = ()
    failures: Iterable[str] = ()
    failure_answers: tuple[str, ...] = ()


IMAGES = Body(
    content={
        "application/octet-stream": BINARY,
        "image/*": BINARY,
        "multipart/form-data": {
            "type": "object",
            "properties": {"image": {"type": "array", "items": BINARY}},
        },
        "application/json": {
            "oneOf": [{**each, "additionalProperties": False} for each in _JSON_IMAGES]
        },
    }
)
"""Images in any form that Convoy's own protocol reads."""

_ONE_MODEL = (
    "/v1/models/{name}",
    "/v1/models/{name}/versions/{version}",
    "/v1/models/{name}/aliases/{alias}",
)
_READYZ = Operation(
    path="/readyz",
    summary="Whether every model is loaded and warmed up.",
    answer=Readiness,
    example=READINESS_EXAMPLE,
    failure_answers=("503",),
)
OPERATIONS = (
    Operation(
        path="/v1/models",
        summary="The served models.",
        answer=ModelList,
        example=models.LIST_EXAMPLE,
        failures=ABOUT_MODELS,
    ),
    *(
        Operation(
            path=path,
            summary="One model: labels, preprocessing, metrics, device.",
            answer=ModelDetails,
            example=models.DETAILS_EXAMPLE,
            failures=ABOUT_MODELS,
        )
        for path in _ONE_MODEL
    ),
    Operation(
        path="/v1/models/{name}/traffic",
        summary="Each version's traffic since the service started, and what each worker serves.",
        answer=ServingStatus,
        example=models.TRAFFIC_EXAMPLE,
        failures=ABOUT_MODELS,
    ),
    Operation(path="/livez", summary="Whether the process answers.", example="ok\n"),
    _READYZ,
    replace(_READYZ, path="/healthz", summary="The same as /readyz."),
    Operation(
        path="/metrics",
        summary="Metrics in Prometheus' text format.",
        example='convoy_requests_total{model_name="fashion",model_version="1",outcome="ok"} 1.0\n',
        failures=ABOUT_MODELS,
    ),
)


def document(protocol_operations: Iterable[Operation]) -> dict[str, Any]:
    """The description as plain data: the protocols' operations, then those of every service."""
    operations = [*protocol_operations, *OPERATIONS]
    records = [Problem, *(record for each in operations for record in _records(each))]
    schemas, components = msgspec.json.schema_components(
        records, ref_template="#/components/schemas/{name}"
    )
    schema_of = {id(record): schema for record, schema in zip(records, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for each in operations:
        paths.setdefault(each.path, {})[each.method] = _operation(each, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Convoy",
            "version": "1",
            "description": "Classifies pictures; every answer names the version that made it.",
        },
        "paths": paths,
        # A service needs tokens only if it is configured so; probes and pages never need one.
        "security": [{}, {"token": []}],
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": components,
        },
    }


def _records(operation: Operation) -> list[Any]:
    """The types whose schemas the description of ``operation`` needs."""
    bodies = operation.body.content.values() if operation.body else ()
    answer = [] if operation.answer is None else [operation.answer]
    return [*answer, *(each for each in bodies if not isinstance(each, dict))]


def _operation(operation: Operation, schema_of: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One operation; ``schema_of`` has the schema of each type, by its ``id``."""
    example = {"example": msgspec.to_builtins(operation.example)}
    if operation.answer is None:
        content = {"text/plain": example}
    else:
        content = {"application/json": {"schema": schema_of[id(operation.answer)], **example}}
    path_parameters = re.findall(r"{(\w+)}", operation.path)
    described = {
        "summary": operation.summary,
        "parameters": [
            *(
                {"name": name, "in": "path", "required": True, **_PARAMETERS[name]}
                for name in path_parameters
            ),
            *operation.query,
        ],
        "responses": {
            "200": {"description": operation.summary, "content": content},
            **responses({code: FAILURES[code] for code in operation.failures}),
            **{
                code: {"description": "Not ready.", "content": content}
                for code in operation.failure_answers
            },
        },
    }
    if operation.body:
        described["requestBody"] = {
            "required": True,
            "content": {
                media_type: {"schema": each if isinstance(each, dict) else schema_of[id(each)]}
                for media_type, each in operation.body.content.items()
            },
        }
        described["x-convoy-send"] = [operation.body.command, operation.body.maker]
    return described
