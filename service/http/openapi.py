"""The OpenAPI 3.1 description of the routes; a test holds it against the routes themselves."""

from typing import Any

from registry.core.problem_details import responses, schema

_PREDICTION = {
    "type": "object",
    "required": ["label", "index", "probability"],
    "properties": {
        "label": {"type": "string"},
        "index": {"type": "integer", "minimum": 0},
        "probability": {"type": "number", "minimum": 0, "maximum": 1},
    },
}
_PREDICTIONS = {"type": "array", "items": {"$ref": "#/components/schemas/Prediction"}}
_CLASSIFICATION = {
    "type": "object",
    "description": "`predictions` for one image, `results` for a list of them.",
    "required": ["model", "request_id", "timings_ms"],
    "properties": {
        "model": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "version": {"type": "integer"},
                "alias": {"type": ["string", "null"]},
            },
        },
        "predictions": _PREDICTIONS,
        "results": {
            "type": "array",
            "description": "One entry per image, in order: `predictions`, or its own `error`.",
            "items": {
                "type": "object",
                "properties": {"predictions": _PREDICTIONS, "error": {"type": "object"}},
            },
        },
        "request_id": {"type": "string"},
        "timings_ms": {"type": "object", "additionalProperties": {"type": "number"}},
    },
}
_FAILURES = {
    "400": "The request is malformed.",
    "401": "The service asks for a key: Authorization: Bearer …",
    "403": "The key may not do this.",
    "404": "The model, version or alias is not served here.",
    "408": "The request did not arrive in its time.",
    "411": "The body is chunked: its length is not said.",
    "413": "Too many bytes, pixels or images.",
    "415": (
        "Not an image type that is accepted (JPEG, PNG, WebP, GIF, BMP, TIFF, PPM), or a body that "
        "is compressed."
    ),
    "422": "The image cannot be decoded.",
    "429": "This caller asks more often than it may; see Retry-After.",
    "431": "The head of the request is too long.",
    "500": "Something went wrong on the service's side; the body has the request's id.",
    "503": "Too many wait, no version is loaded, or keys cannot be read; see Retry-After.",
    "504": "The image waited longer than its time.",
}
_BASE64 = {"type": "string", "contentEncoding": "base64"}
_BODY = {
    "required": True,
    "content": {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "image": {"type": "array", "items": {"type": "string", "format": "binary"}}
                },
            }
        },
        "application/json": {
            "schema": {
                "oneOf": [
                    {
                        "type": "object",
                        "required": ["image"],
                        "properties": {"image": _BASE64},
                        "additionalProperties": False,
                    },
                    {
                        "type": "object",
                        "required": ["images"],
                        "properties": {"images": {"type": "array", "items": _BASE64}},
                        "additionalProperties": False,
                    },
                ]
            }
        },
    },
}
_PARAMETERS: dict[str, dict[str, Any]] = {
    "name": {"description": "Name of a served model.", "schema": {"type": "string"}},
    "version": {"description": "Number of the version.", "schema": {"type": "integer"}},
    "alias": {"description": "Alias that chose the version.", "schema": {"type": "string"}},
}
_TOP_K = {
    "name": "top_k",
    "in": "query",
    "description": "How many classes to answer with, best first (default 5).",
    "schema": {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 5},
}


def document() -> dict[str, Any]:
    """The description as plain data."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Convoy",
            "version": "1",
            "description": "Classifies pictures; every answer names the version that made it.",
        },
        "paths": {
            **{
                f"{path}/classify": {"post": _classify(path)}
                for path in (
                    "/v1",
                    "/v1/models/{name}",
                    "/v1/models/{name}/versions/{version}",
                    "/v1/models/{name}/aliases/{alias}",
                )
            },
            "/v1/models": {"get": _get("The models that are served.", "/v1/models")},
            **{
                path: {"get": _get("One model: labels, preprocessing, metrics, device.", path)}
                for path in (
                    "/v1/models/{name}",
                    "/v1/models/{name}/versions/{version}",
                    "/v1/models/{name}/aliases/{alias}",
                )
            },
            "/v1/models/{name}/traffic": {
                "get": _get(
                    "What each version did since the service started, and what each worker serves.",
                    "/v1/models/{name}/traffic",
                )
            },
            "/livez": {"get": _get("Whether the process answers.", text=True)},
            "/readyz": {"get": _get("Whether every model is loaded and warmed up.", ready=True)},
            "/healthz": {"get": _get("The same as /readyz.", ready=True)},
            "/metrics": {"get": _get("Metrics in Prometheus' text format.", "/metrics", text=True)},
        },
        # Of which a service asks only if it was told to; probes and pages are open always.
        "security": [{}, {"key": []}],
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Prediction": _PREDICTION,
                "Classification": _CLASSIFICATION,
                "Problem": schema("request_id"),
            },
        },
    }


def _classify(path: str) -> dict[str, Any]:
    return {
        "summary": "Classify one image, or many.",
        "parameters": [*_path_parameters(path), _TOP_K],
        "requestBody": _BODY,
        "responses": {
            "200": {
                "description": "The most probable classes, best first.",
                "content": _json("Classification"),
            },
            **responses(_FAILURES),
        },
    }


def _get(
    summary: str, path: str = "", *, text: bool = False, ready: bool = False
) -> dict[str, Any]:
    content = {"text/plain": {}} if text else {"application/json": {"schema": {"type": "object"}}}
    failures = {code: _FAILURES[code] for code in ("401", "403", "404", "503") if path}
    not_ready = {"503": {"description": "Not ready.", "content": content}} if ready else {}
    return {
        "summary": summary,
        "parameters": _path_parameters(path),
        "responses": {
            "200": {"description": summary, "content": content},
            **not_ready,
            **responses(failures),
        },
    }


def _path_parameters(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, **described}
        for name, described in _PARAMETERS.items()
        if "{" + name + "}" in path
    ]


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
