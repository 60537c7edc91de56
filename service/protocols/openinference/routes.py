"""The protocol's routes besides inference: health, metadata, configuration, statistics, index."""

from typing import Any

import msgspec
from flask import Blueprint, Response, g
from werkzeug.exceptions import abort

from service.http.health import is_ready
from service.inference.loaded_model import ActiveVersions, ServedModel
from service.protocols.openinference.metadata import (
    index,
    model_config,
    model_metadata,
    model_statistics,
    server_metadata,
)
from service.protocols.openinference.operations import Live, ModelReady, Ready
from service.protocols.openinference.protocol import error_answer, target
from service.state import state

blueprint = Blueprint("openinference", __name__)

_NAMED = "/v2/models/<name>", "/v2/models/<name>/versions/<version>"
_WHY_NOT = {
    "repository": "versions are loaded when they become champion or canary in the registry; "
    "clients cannot load or unload them",
    "systemsharedmemory": "shared memory is not supported; send tensors in the body",
    "cudasharedmemory": "shared memory is not supported; send tensors in the body",
    "trace": "trace settings are not supported",
    "logging": "log settings are not supported; CONVOY_LOG_LEVEL sets the level",
}


@blueprint.errorhandler(Exception)
def answer_error(error: Exception) -> Response:
    """The answer to a request of this module that failed."""
    return error_answer(error, g.request_id)


@blueprint.get("/v2")
def show_server() -> Response:
    """The server and the extensions that it supports."""
    return _json(server_metadata())


@blueprint.get("/v2/health/live")
def live() -> Response:
    """200 as long as this process answers."""
    return _json(Live(live=True))


@blueprint.get("/v2/health/ready")
def server_ready() -> Response:
    """200 when every model has a version that is loaded, warmed up and proved; else 503."""
    ready = is_ready()
    return _json(Ready(live=True, ready=ready), 200 if ready else 503)


@blueprint.get(_NAMED[0])
@blueprint.get(_NAMED[1])
def show_model(name: str, version: str | None = None) -> Response:
    """One version: its tensors, labels and preprocessing."""
    return _json(model_metadata(*_find(name, version)))


@blueprint.get(f"{_NAMED[0]}/ready")
@blueprint.get(f"{_NAMED[1]}/ready")
def model_ready(name: str, version: str | None = None) -> Response:
    """200 when the version is loaded; 404 or 503 otherwise."""
    served, _ = _find(name, version)
    return _json(ModelReady(served.name, ready=True))


@blueprint.get(f"{_NAMED[0]}/config")
@blueprint.get(f"{_NAMED[1]}/config")
def show_config(name: str, version: str | None = None) -> Response:
    """One version, as Triton describes a model's configuration."""
    served, _ = _find(name, version)
    return _json(model_config(served, state().settings.max_batch))


@blueprint.get("/v2/models/stats")
@blueprint.get(f"{_NAMED[0]}/stats")
@blueprint.get(f"{_NAMED[1]}/stats")
def show_statistics(name: str | None = None, version: str | None = None) -> Response:
    """Counts and times of all versions of all models, of one model, or of one version."""
    return _json(model_statistics(state(), target(name or "", version)))


@blueprint.post("/v2/repository/index")
def show_index() -> Response:
    """The versions that serve, and the models for which none does."""
    return _json(index(state().slots))


@blueprint.route("/v2/<path:rest>", methods=["GET", "POST"])
def refuse(rest: str) -> Response:
    """404 for parts of the protocol that Convoy does not support."""
    detail = f"/v2/{rest[:80]} does not exist here; GET /v2 lists the supported extensions"
    abort(404, next((_WHY_NOT[part] for part in rest.split("/") if part in _WHY_NOT), detail))


def _find(name: str, version: str | None) -> tuple[ServedModel, ActiveVersions]:
    """The version that a path names, for the answer's headers too, and all that serve."""
    served, serving = state().pipeline.find(target(name, version))
    g.served = served
    return served, serving


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, mimetype="application/json")
