"""``/openapi.json`` describes the API for programs, and ``/docs`` shows the description to people.

The page is rendered from the description alone. ``static/docs.js`` sends the requests of its forms.
"""

from functools import cached_property
from typing import Any

import msgspec
from flask import Blueprint, Flask, Response, current_app, redirect, render_template, request
from werkzeug.wrappers import Response as BaseResponse

from service.http.openapi import Operation, document
from service.http.page import POLICY

BASE = "http://127.0.0.1:8080"  # ``static/docs.js`` replaces it with the page's address
EXTENSION = "convoy.description"
blueprint = Blueprint("docs", __name__)


class Description:
    """The description as JSON and as a page; the first request for each makes it."""

    def __init__(self, protocol_operations: list[Operation]) -> None:
        self._protocol_operations = protocol_operations

    @cached_property
    def openapi(self) -> bytes:
        """The OpenAPI description, as JSON in UTF-8."""
        return msgspec.json.encode(document(self._protocol_operations))

    @cached_property
    def page(self) -> str:
        """The HTML of ``/docs``; it can only be made while Flask handles a request."""
        return _page(document(self._protocol_operations))


def init_app(app: Flask, protocol_operations: list[Operation]) -> None:
    """Describe the protocols' operations, and the routes that every service has."""
    app.extensions[EXTENSION] = Description(protocol_operations)
    app.register_blueprint(blueprint)


@blueprint.get("/openapi.json")
def openapi() -> Response:
    """The OpenAPI description of this service, as JSON."""
    description: Description = current_app.extensions[EXTENSION]
    return Response(description.openapi, mimetype="application/json")


@blueprint.get("/docs")
def docs() -> BaseResponse:
    """The page that describes the API; ``/docs/`` is redirected to ``/docs``."""
    if request.path.endswith("/"):
        return redirect("../docs")  # the addresses of the page's files are relative
    description: Description = current_app.extensions[EXTENSION]
    response = Response(description.page, mimetype="text/html")
    response.headers["Content-Security-Policy"] = POLICY
    return response


def curl_line(path: str, operation: dict[str, Any]) -> str:
    """The curl command that sends the request with the examples of its parameters."""
    parameters = operation.get("parameters", [])
    for each in parameters:
        path = path.replace(f"{{{each['name']}}}", str(each["example"]))
    query = "&".join(
        f"{each['name']}={each['example']}" for each in parameters if each["in"] == "query"
    )
    url = f"{BASE}{path}?{query}" if query else f"{BASE}{path}"
    command, _ = operation.get("x-convoy-send", ("curl -s", ""))
    return f"{command} '{url}'"


def _page(described: dict[str, Any]) -> str:
    operations = [
        (method, path, operation, curl_line(path, operation))
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    ]
    return render_template(
        "docs.html", api=described, operations=operations, base=BASE, as_json=_as_json
    )


def _as_json(value: Any) -> str:
    """``value`` as indented JSON, its fields in the order of the answer."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
