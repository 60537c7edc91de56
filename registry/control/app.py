"""The control plane's WSGI application, put together."""

from flask import Flask, Response, g, request

from registry.control import pages
from registry.control.api import ROUTES
from registry.control.state import COOKIE, Control, control, describe_error
from registry.core.paths import Home
from registry.core.problem_details import Problem
from registry.store.mlflow_store import ModelStore

MOST_BYTES = 64 * 1024
# Nothing of another origin, nothing inline.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def create_app(store: ModelStore, home: Home, services: tuple[str, ...] = ()) -> Flask:
    """The WSGI application.

    Args:
        store: the registry.
        home: tokens, policies and the caches of plans and judgements lie there.
        services: addresses of those who serve, for live figures.
    """
    app = Flask(__name__)
    app.extensions["convoy"] = Control(store, home, services)
    app.config["MAX_CONTENT_LENGTH"] = MOST_BYTES
    app.config["MAX_FORM_MEMORY_SIZE"] = MOST_BYTES
    app.before_request(_identify)
    app.after_request(_harden)
    app.register_error_handler(Exception, _answer_error)
    for rule, method, view in ROUTES:
        app.add_url_rule(rule, f"{method} {rule}", view, methods=[method])
    pages.init_app(app)
    return app


def _identify() -> None:
    """Note the caller: ``g.token`` by the header, ``g.visitor`` by the session's cookie."""
    g.token = g.visitor = None
    tokens = control().tokens
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        g.token = tokens.find(text.strip())
    elif session := control().sessions.find(request.cookies.get(COOKIE, "")):
        g.visitor = tokens.find_digest(session.token_sha256)


def _harden(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "same-origin"
    response.headers.setdefault("Cache-Control", "no-store")
    return response


def _answer_error(error: Exception) -> Response:
    return Problem.of(*describe_error(error)).answer(error)
