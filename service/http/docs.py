"""``/openapi.json`` and ``/docs``: the API for programs, and the same for people."""

import html
from functools import cached_property
from typing import Any

import msgspec
from flask import Blueprint, Flask, Response, current_app, redirect, request
from werkzeug.wrappers import Response as BaseResponse

from service.http.openapi import Operation, document
from service.http.page import POLICY

EXTENSION = "convoy.description"
blueprint = Blueprint("docs", __name__)


class Description:
    """The description in both forms, each made when it is first asked for."""

    def __init__(self, of_protocols: list[Operation]) -> None:
        self._of_protocols = of_protocols

    @cached_property
    def openapi(self) -> bytes:
        return msgspec.json.encode(document(self._of_protocols))

    @cached_property
    def page(self) -> str:
        return _page(document(self._of_protocols))


def init_app(app: Flask, of_protocols: list[Operation]) -> None:
    """Describe ``of_protocols``, and the routes that every service has."""
    app.extensions[EXTENSION] = Description(of_protocols)
    app.register_blueprint(blueprint)


@blueprint.get("/openapi.json")
def openapi() -> Response:
    description: Description = current_app.extensions[EXTENSION]
    return Response(description.openapi, mimetype="application/json")


@blueprint.get("/docs")
def docs() -> BaseResponse:
    if request.path.endswith("/"):
        return redirect("../docs")  # its files' addresses are relative
    description: Description = current_app.extensions[EXTENSION]
    response = Response(description.page, mimetype="text/html")
    response.headers["Content-Security-Policy"] = POLICY
    return response


def _page(described: dict[str, Any]) -> str:
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'><title>Convoy API</title>"
        "<link rel=stylesheet href=static/style.css><main class=docs><h1>Convoy API</h1>",
        f"<p>{html.escape(described['info']['description'])} "
        "<a href=openapi.json>openapi.json</a></p>",
    ]
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            parts.append(_operation(path, method, operation))
    return "".join(parts) + "</main></html>"


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(code)}<td>{html.escape(answer['description'])}"
        for code, answer in operation["responses"].items()
    )
    inputs = "".join(
        f"<li><code>{html.escape(each['name'])}</code> ({each['in']}): "
        f"{html.escape(each.get('description', ''))}"
        for each in operation.get("parameters", [])
    )
    bodies = ", ".join(operation.get("requestBody", {}).get("content", {}))
    accepts = f"<p>Body: {html.escape(bodies)}</p>" if bodies else ""
    return (
        f"<h2><b>{method.upper()}</b> <code>{html.escape(path)}</code></h2>"
        f"<p>{html.escape(operation['summary'])}</p><ul>{inputs}</ul>{accepts}"
        f"<table><tr><th>status<th>meaning{rows}</table>"
    )
