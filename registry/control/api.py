"""The control plane's HTTP API, for operators and their programs.

The control plane is a separate process with its own port (``convoy control``), so the
service cannot change the champion. Every decision goes through ``registry.promotion.promotion``, as
from the command line. A program must send ``Authorization: Bearer TOKEN`` to decide by the API. A
browser's session cookie (``registry.control.pages``) only reads here; it decides through the forms
of the pages.
"""

from collections.abc import Callable
from typing import Any

import msgspec
from flask import Response, g, request
from msgspec.structs import asdict

from registry.control.answers import (
    Audit,
    GatePending,
    History,
    ModelStatus,
    ModelStatuses,
    TaggedVersion,
    Version,
    Versions,
)
from registry.control.openapi import document
from registry.control.state import control_state
from registry.core import errors as domain
from registry.core.names import check_model_name
from registry.model.refs import ModelRef
from registry.promotion.decision_requests import BODIES, DecisionRequest
from registry.promotion.decisions import audit
from registry.store.audit_log import moments

GATE_RETRY_S = 2


def list_models() -> Response:
    """200 with ``ModelStatuses``: the aliases and the canary of every model."""
    store = control_state().store
    return _json(ModelStatuses([_model_status(name) for name in store.models()]))


def show_model(name: str) -> Response:
    """200 with ``ModelStatus``: the model's aliases and its canary."""
    return _json(_model_status(name))


def list_versions(name: str) -> Response:
    """200 with ``Versions``: the model's versions with their tags, newest first."""
    rows = control_state().store.versions(check_model_name(name))
    return _json(Versions([TaggedVersion(**asdict(each), tags=tags) for each, tags in rows]))


def show_version(name: str, version: int) -> Response:
    """200 with ``Version``: the version and the manifest in its bundle."""
    found = control_state().store.resolve(ModelRef(check_model_name(name), version))
    manifest = control_state().store.manifest(found)
    return _json(Version(found, manifest))


def show_gate_result(name: str, version: int) -> Response:
    """200 with ``GateResult``, or 202 while the gate runs; the first request starts the gate.

    The header ``Retry-After`` of a 202 says after how many seconds to ask again.
    """
    result = control_state().gate_result(check_model_name(name), version)
    if result is None:
        response = _json(GatePending(), 202)
        response.headers["Retry-After"] = str(GATE_RETRY_S)
        return response
    return _json(result)


def show_traffic(name: str) -> Response:
    """200 with ``ServingStatus``: the workers and the counts of each version, over all services.

    Raises:
        VersionNotFound: there is no such model.
        ModelNotReady: a service cannot be reached, or does not serve the model.
    """
    control_state().store.aliases.read(check_model_name(name))  # raises if there is no such model
    return _json(control_state().serving_status(name))


def show_history(name: str) -> Response:
    """200 with ``History``: the lines of the audit log, oldest first.

    The query parameter ``at`` is a day or a moment in ISO 8601, UTC if it has no time zone. With
    it, the answer has only the lines that made the champions of that time.

    Raises:
        VersionNotFound: there is no such model.
        UsageError: ``at`` is neither a day nor a moment.
    """
    store = control_state().store
    store.aliases.read(check_model_name(name))  # raises if there is no such model
    audit_log, at = store.audit_logs.read(name), request.args.get("at")
    return _json(History(audit_log.champion_periods(*moments(at)) if at else audit_log.lines))


def show_audit(name: str) -> Response:
    """200 with ``Audit``: the number of lines, and the faults of the audit log and the aliases.

    A fault does not change the status.
    """
    control_state().store.aliases.read(check_model_name(name))
    lines, faults = audit(control_state().store, name)
    return _json(Audit(lines, faults))


def _decision(kind: type[DecisionRequest]) -> Callable[..., Response]:
    """A view that reads a decision of this ``kind`` from the body and carries it out."""

    def post(name: str) -> Response:
        try:
            decision = msgspec.json.decode(request.get_data() or b"{}", type=kind)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise domain.UsageError(f"the request body is not valid: {error}") from error
        return _json(control_state().carry_out(decision, name, g.token.name))

    return post


def livez() -> Response:
    """200 with the text ``ok``, without a token: the process answers."""
    return Response("ok\n", mimetype="text/plain")


def openapi() -> Response:
    """200 with the API's OpenAPI 3.1 description as JSON, without a token."""
    return _json(document())


_MODEL = "/v1/models/<name>"
# ``registry.control.app`` checks which token may use which route.
ROUTES: tuple[tuple[str, str, Callable[..., Response]], ...] = (
    ("/livez", "GET", livez),
    ("/openapi.json", "GET", openapi),
    ("/v1/models", "GET", list_models),
    (_MODEL, "GET", show_model),
    (f"{_MODEL}/versions", "GET", list_versions),
    (f"{_MODEL}/versions/<int:version>", "GET", show_version),
    (f"{_MODEL}/versions/<int:version>/gate-result", "GET", show_gate_result),
    (f"{_MODEL}/traffic", "GET", show_traffic),
    (f"{_MODEL}/history", "GET", show_history),
    (f"{_MODEL}/audit", "GET", show_audit),
    *((f"{_MODEL}/{verb}", "POST", _decision(kind)) for verb, kind in BODIES.items()),
)


def _model_status(name: str) -> ModelStatus:
    aliases, canary = control_state().store.aliases.read_with_canary(check_model_name(name))
    return ModelStatus(name, aliases, canary)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, mimetype="application/json")
