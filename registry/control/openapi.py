"""The OpenAPI 3.1 description of the control plane, generated from the records of its answers.

A test compares it with the routes.
"""

from functools import cache
from typing import Any

import msgspec

from registry.canary.traffic_stats import ServingStatus
from registry.control.answers import (
    Audit,
    GatePending,
    History,
    ModelStatus,
    ModelStatuses,
    Version,
    Versions,
)
from registry.core.problem_details import Problem, responses
from registry.promotion.decision_requests import BODIES
from registry.promotion.gate_runner import GateResult
from registry.store.audit_log import Line

_FAILURES = {
    "400": "The body or a parameter is not valid.",
    "401": "The token is missing or unknown.",
    "403": "The token's role does not permit this.",
    "404": "There is no such model or version, no previous champion, or no canary.",
    "409": "The champion or the canary is not the expected one: read the present state again.",
    "413": "The body is too large.",
    "422": (
        "The gate refuses the version; the refusal is in the audit log. `force` with a `reason` "
        "overrides the gate. `allow_new_classes` accepts classes that differ."
    ),
    "503": "The registry or a service does not answer.",
}
_SCHEMAS = "#/components/schemas/"
_NUMBER = {"type": "integer", "minimum": 1}
_DECISIONS = {
    "promote": "Make a version the champion, if the gate accepts it.",
    "roll-back": "Make the previous champion champion again.",
    "canary/start": "Have a challenger answer a share of the requests, score a shadow, or both.",
    "canary/stop": "End the canary.",
}
# Path, summary, and the record of the answer.
_READS: tuple[tuple[str, str, type], ...] = (
    ("/v1/models", "All models: aliases and canary.", ModelStatuses),
    ("/v1/models/{name}", "One model: aliases and canary.", ModelStatus),
    (
        "/v1/models/{name}/versions",
        "The versions of a model with their metrics, newest first.",
        Versions,
    ),
    ("/v1/models/{name}/versions/{version}", "One version: its manifest.", Version),
    (
        "/v1/models/{name}/versions/{version}/gate-result",
        "The gate result of a version; 202 while the gate is running.",
        GateResult,
    ),
    (
        "/v1/models/{name}/traffic",
        "How the services serve the model: workers, and each version's figures.",
        ServingStatus,
    ),
    (
        "/v1/models/{name}/history",
        "All decisions; with `at`, a day or a moment, those that made the champions of that time.",
        History,
    ),
    (
        "/v1/models/{name}/audit",
        "Whether lines of the audit log are missing, and whether the aliases agree with it. It "
        "does not find a rewritten line.",
        Audit,
    ),
)


@cache
def document() -> dict[str, Any]:
    """The description as plain data."""
    _, components = msgspec.json.schema_components(
        [*BODIES.values(), *(record for _, _, record in _READS), Line, GatePending, Problem],
        ref_template=_SCHEMAS + "{name}",
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Convoy's control plane",
            "version": "1",
            "description": "Compare versions, promote, roll back, start and stop canaries.",
        },
        "security": [{"token": []}],
        "paths": {
            "/livez": {"get": _open("Whether the process answers.", "text/plain")},
            "/openapi.json": {"get": _open("This description.", "application/json")},
            **{path: {"get": _read(path, summary, record)} for path, summary, record in _READS},
            **{
                f"/v1/models/{{name}}/{verb}": {"post": _decision(verb, summary)}
                for verb, summary in _DECISIONS.items()
            },
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": components,
        },
    }


def _open(summary: str, media_type: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "security": [],
        "responses": {"200": {"description": summary, "content": {media_type: {}}}},
    }


def _read(path: str, summary: str, record: type) -> dict[str, Any]:
    parameters = _path_parameters(path)
    if path.endswith("/history"):
        parameters.append({"name": "at", "in": "query", "schema": {"type": "string"}})
    answers = {"200": _answer(summary, record)}
    if path.endswith("/gate-result"):
        answers["202"] = _answer(
            "The gate is running; ask again after Retry-After seconds.", GatePending
        )
    codes = ("400", "401", "404", "422", "503")
    return {"summary": summary, "parameters": parameters, "responses": answers | _problems(codes)}


def _decision(verb: str, summary: str) -> dict[str, Any]:
    body = _reference(BODIES[verb])
    return {
        "summary": summary,
        "parameters": _path_parameters("{name}"),
        "requestBody": {"content": {"application/json": {"schema": body}}},
        "responses": {
            "200": _answer("The line of the audit log.", Line),
            **_problems(tuple(_FAILURES)),
        },
    }


def _answer(description: str, record: type) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference(record)}}
    return {"description": description, "content": content}


def _reference(record: type) -> dict[str, str]:
    return {"$ref": _SCHEMAS + record.__name__}


def _problems(codes: tuple[str, ...]) -> dict[str, Any]:
    return responses({code: _FAILURES[code] for code in codes})


def _path_parameters(path: str) -> list[dict[str, Any]]:
    kinds = {"name": {"type": "string"}, "version": _NUMBER}
    return [
        {"name": name, "in": "path", "required": True, "schema": schema}
        for name, schema in kinds.items()
        if "{" + name + "}" in path
    ]
