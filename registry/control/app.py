"""Builds the control plane's WSGI application."""

from flask import Flask, Response, g, request
from werkzeug.wrappers import Response as BaseResponse

from registry.auth.bearer import bearer_token, require
from registry.control import pages
from registry.control.api import ROUTES
from registry.control.state import COOKIE, ControlState, control_state, describe_error
from registry.core.paths import Paths
from registry.core.problem_details import Problem
from registry.store.mlflow_store import ModelStore

MAX_BYTES = 64 * 1024
# The only routes that need no token.
PUBLIC = frozenset(
    {"GET /livez", "GET /openapi.json", "pages.sign_in", "pages.signed_in", "static"}
)
# Browsers load nothing from other origins, and run no inline script or style.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def create_app(store: ModelStore, paths: Paths, services: tuple[str, ...] = ()) -> Flask:
    """The WSGI application.

    Args:
        store: the registry.
        paths: where tokens, policies and the caches of plans and gate results are.
        services: addresses of the services whose traffic the pages show.
    """
    app = Flask(__name__)
    app.extensions["convoy"] = ControlState(store, paths, services)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BYTES
    app.config["MAX_FORM_MEMORY_SIZE"] = MAX_BYTES
    app.before_request(_authorize)
    app.after_request(_harden)
    app.register_error_handler(Exception, _answer_error)
    for rule, method, view in ROUTES:
        app.add_url_rule(rule, f"{method} {rule}", view, methods=[method])
    pages.init_app(app)
    return app


def _authorize() -> BaseResponse | None:
    """Identify the client, and refuse the request if its token does not permit it.

    ``g.token`` is the token in the header, ``g.visitor`` that of the cookie's session. A cookie
    cannot authorize a decision in the API, because browsers send cookies by themselves, also for
    other sites. Forms on pages bring a secret in addition.

    Raises:
        TokenMissing: the route is not public, and the client sent no known token.
        TokenInsufficient: the token's role does not permit the request.
    """
    g.token = g.visitor = None
    tokens = control_state().tokens
    if sent := bearer_token(request.headers.get("Authorization", "")):
        g.token = tokens.find(sent)
    elif session := control_state().sessions.find(request.cookies.get(COOKIE, "")):
        g.visitor = tokens.find_digest(session.token_sha256)
    if request.endpoint is None or request.endpoint in PUBLIC:
        return None
    if request.blueprint == pages.blueprint.name:
        may_view = g.visitor is not None and g.visitor.may("view")
        return None if may_view else pages.ask_to_sign_in()
    if request.method in ("GET", "HEAD", "OPTIONS"):
        require(g.token or g.visitor, "view")
    else:
        require(g.token, "decide")
    return None


def _harden(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "same-origin"
    response.headers.setdefault("Cache-Control", "no-store")
    return response


def _answer_error(error: Exception) -> Response:
    return Problem.of(*describe_error(error)).answer(error)
