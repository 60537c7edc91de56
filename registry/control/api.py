"""The control plane: an HTTP API for operators and their programs, and pages over it.

An app of its own on a port of its own, ``python -m registry serve``, so that what serves pictures
holds no right to move a champion. Everything that is decided goes through
``registry.promotion.promotion``, as from the command line. Programs send ``Authorization: Bearer
TOKEN``; only that may decide by the API. Browsers get a session (``registry.control.pages``), whose
cookie reads, and decides by forms only.
"""

from collections.abc import Callable
from typing import Any

import msgspec
from flask import Response, g, request
from msgspec.structs import asdict

from registry.control.answers import (
    Audit,
    History,
    Judging,
    Standing,
    Standings,
    TaggedVersion,
    Version,
    Versions,
)
from registry.control.openapi import document
from registry.control.state import control
from registry.core import errors as domain
from registry.core.names import check_model_name
from registry.model.refs import ModelRef
from registry.promotion.commands import BODIES, Decision
from registry.promotion.promotion import audit
from registry.store.audit_log import moments

JUDGING_RETRY_S = 2


def list_models() -> Response:
    store = control().store
    return _json(Standings([_standing(name) for name in store.models()]))


def show_model(name: str) -> Response:
    return _json(_standing(name))


def list_versions(name: str) -> Response:
    rows = control().store.versions(check_model_name(name))
    return _json(Versions([TaggedVersion(**asdict(each), tags=tags) for each, tags in rows]))


def show_version(name: str, version: int) -> Response:
    found = control().store.resolve(ModelRef(check_model_name(name), version))
    manifest = control().store.manifest(found)
    return _json(Version(found, manifest))


def show_verdict(name: str, version: int) -> Response:
    judged = control().judgement(check_model_name(name), version)
    if judged is None:
        response = _json(Judging(), 202)
        response.headers["Retry-After"] = str(JUDGING_RETRY_S)
        return response
    return _json(judged)


def show_traffic(name: str) -> Response:
    control().store.aliases(check_model_name(name))  # says so if there is no such model
    return _json(control().live(name))


def show_history(name: str) -> Response:
    store = control().store
    store.aliases(check_model_name(name))  # says so if there is no such model
    ledger, at = store.ledger(name), request.args.get("at")
    return _json(History(ledger.reigns(*moments(at)) if at else ledger.lines))


def show_audit(name: str) -> Response:
    control().store.aliases(check_model_name(name))
    lines, faults = audit(control().store, name)
    return _json(Audit(lines, faults))


def _decision(kind: type[Decision]) -> Callable[..., Response]:
    """The view that has carried out what a body says."""

    def post(name: str) -> Response:
        try:
            decision = msgspec.json.decode(request.get_data() or b"{}", type=kind)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise domain.UsageError(f"the body cannot be used: {error}") from error
        return _json(control().carry_out(decision, name, g.token.name))

    return post


def livez() -> Response:
    return Response("ok\n", mimetype="text/plain")


def openapi() -> Response:
    return _json(document())


_MODEL = "/v1/models/<name>"
# What programs use; ``registry.control.app`` says who may.
ROUTES: tuple[tuple[str, str, Callable[..., Response]], ...] = (
    ("/livez", "GET", livez),
    ("/openapi.json", "GET", openapi),
    ("/v1/models", "GET", list_models),
    (_MODEL, "GET", show_model),
    (f"{_MODEL}/versions", "GET", list_versions),
    (f"{_MODEL}/versions/<int:version>", "GET", show_version),
    (f"{_MODEL}/versions/<int:version>/verdict", "GET", show_verdict),
    (f"{_MODEL}/traffic", "GET", show_traffic),
    (f"{_MODEL}/history", "GET", show_history),
    (f"{_MODEL}/audit", "GET", show_audit),
    *((f"{_MODEL}/{verb}", "POST", _decision(kind)) for verb, kind in BODIES.items()),
)


def _standing(name: str) -> Standing:
    aliases, trial = control().store.standing(check_model_name(name))
    return Standing(name, aliases, trial)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, mimetype="application/json")
