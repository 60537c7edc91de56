"""The control plane: an HTTP API for operators and their programs, and pages over it.

An app of its own on a port of its own, ``python -m registry serve``, so that what serves pictures
holds no right to move a champion. Everything that is decided goes through ``registry.promotion``,
as from the command line. Programs send ``Authorization: Bearer TOKEN``; only that may decide by the
API. Browsers get a session (``registry.pages``), whose cookie reads, and decides by forms only.
"""

import logging
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from threading import Lock, Thread
from typing import Any, ParamSpec

import msgspec
from flask import Flask, Response, current_app, g, request
from werkzeug.exceptions import HTTPException

from registry import errors as domain
from registry.api_document import document
from registry.bundle import open_bundle
from registry.contract import Manifest, ModelRef, ModelVersion, check_model_name
from registry.decisions import BODIES, Decision
from registry.home import Home
from registry.judging import Judge, Judgement
from registry.ledger import Line, moments
from registry.live import Live
from registry.live_history import LiveHistory
from registry.problems import Problem
from registry.promotion import audit
from registry.services import read_live
from registry.sessions import Sessions
from registry.store import ModelStore
from registry.tokens import Tokens

log = logging.getLogger(__name__)

COOKIE = "convoy"
MOST_BYTES = 64 * 1024
JUDGING_RETRY_S = 2
SAID_S = 60.0  # a judgement without figures is not kept on disk: what is wrong may be mended
# Nothing of another origin, nothing inline.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
STATUS: dict[type[domain.ConvoyError], int] = {
    domain.UsageError: 400,
    domain.VersionNotFound: 404,
    domain.PromotionConflict: 409,
    domain.PromotionRefused: 422,
    domain.BundleInvalid: 422,
    domain.RegistryUnavailable: 503,
    domain.ModelNotReady: 503,
    domain.KeysUnavailable: 503,
}
P = ParamSpec("P")
REPORT = re.compile(r"report/[A-Za-z0-9_.-]{1,80}\.png")
REPORTS_KEPT = 20


class Control:
    """What the control plane's requests work on."""

    def __init__(self, store: ModelStore, home: Home, services: tuple[str, ...]) -> None:
        self.store = store
        self.home = home
        self.services = services
        self.tokens = Tokens(home.tokens)
        self.sessions = Sessions(home.sessions)
        self.judge = Judge(store, home)
        self.history = LiveHistory(self.live)
        self._judging: dict[tuple[str, int], Thread] = {}
        self._said: dict[tuple[str, int], tuple[float, Judgement | Exception]] = {}
        self._lock = Lock()
        self._fetching = Lock()

    def judgement(self, name: str, version: int) -> Judgement | None:
        """The gate's word on a version; None while it is being found, which this begins.

        Raises:
            ConvoyError: why it was not found, of the last minute.
        """
        champion, challenger = self.store.sides(name, version)
        if known := self.judge.known(champion, challenger):
            return known
        with self._lock:
            at, said = self._said.get((name, version), (-SAID_S, None))
            if time.monotonic() - at < SAID_S:
                if isinstance(said, Exception):
                    raise said
                if said and said.champion == (champion.version if champion else None):
                    return said
            running = self._judging.get((name, version))
            if running is None or not running.is_alive():
                sides = (champion, challenger)
                thread = Thread(target=self._judge, args=sides, name="judge", daemon=True)
                self._judging[name, version] = thread
                thread.start()
        return None

    def carry_out(self, decision: Decision, name: str, by: str) -> Line:
        """The ledger's line of ``decision`` about the model ``name``; raises as promotions do."""
        return decision.carry_out(self.store, self.judge, check_model_name(name), by)

    def live(self, name: str) -> Live:
        """How the services serve ``name``; raises ``ModelNotReady`` when they do not say."""
        return read_live(self.services, name)

    def picture(self, version: ModelVersion, path: str) -> bytes | None:
        """A picture of the version's report, all of which are fetched once and kept."""
        folder = self.home.reports / version.manifest_sha256
        with self._fetching:  # a page asks for all its pictures at once
            with suppress(domain.BundleInvalid):
                bundle = open_bundle(folder, version.manifest_sha256)
                return bundle.read(path) if path in report_files(bundle.manifest) else None
            bundle = self.store.download(version, folder, lambda each: report_files(each.manifest))
            kept = sorted(folder.parent.iterdir(), key=lambda path: -path.stat().st_mtime)
            for old in kept[REPORTS_KEPT:]:
                shutil.rmtree(old, ignore_errors=True)
            return bundle.read(path) if path in report_files(bundle.manifest) else None

    def _judge(self, champion: ModelVersion | None, challenger: ModelVersion) -> None:
        said: Judgement | Exception
        try:
            said = self.judge.judge(champion, challenger)
        except Exception as error:  # the edge of a thread; who asks again is told
            log.exception("%s version %d was not judged", challenger.name, challenger.version)
            said = error
        if isinstance(said, Judgement) and said.verdict is not None:
            return  # it lies on disk
        now = time.monotonic()
        with self._lock:
            self._said = {key: row for key, row in self._said.items() if now - row[0] < SAID_S}
            self._said[challenger.name, challenger.version] = now, said


def create_app(store: ModelStore, home: Home, services: tuple[str, ...] = ()) -> Flask:
    """The WSGI application.

    Args:
        store: the registry.
        home: tokens, policies and the caches of plans and judgements lie there.
        services: addresses of those who serve, for live figures.
    """
    from registry import pages

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


def report_files(manifest: Manifest) -> list[str]:
    """The pictures of a version's report that pages show."""
    return sorted(file for file in manifest.files if REPORT.fullmatch(file))


def control() -> Control:
    found: Control = current_app.extensions["convoy"]
    return found


def may_look(view: Callable[P, Any]) -> Callable[P, Any]:
    """Of a view: for whoever has a token, of any role, in a header or a session."""

    @wraps(view)
    def guarded(*arguments: P.args, **named: P.kwargs) -> Any:
        known = g.token or g.visitor
        if known is None:
            return _refuse(401, "send a token: Authorization: Bearer …")
        if not known.may_look:
            return _refuse(403, f"the token {known.name!r} may classify, not look")
        return view(*arguments, **named)

    return guarded


def may_decide(view: Callable[P, Any]) -> Callable[P, Any]:
    """Of a view: for an operator's token in a header. A cookie is not enough: it sends itself."""

    @wraps(view)
    def guarded(*arguments: P.args, **named: P.kwargs) -> Any:
        if g.token is None:
            return _refuse(401, "send a token: Authorization: Bearer …")
        if not g.token.may_decide:
            return _refuse(403, f"the token {g.token.name!r} may look, not decide")
        return view(*arguments, **named)

    return guarded


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


def list_models() -> Response:
    store = control().store
    return _json({"models": [_standing(name) for name in store.models()]})


def show_model(name: str) -> Response:
    return _json(_standing(name))


def list_versions(name: str) -> Response:
    rows = control().store.versions(check_model_name(name))
    return _json({"versions": [{**msgspec.to_builtins(each), "tags": tags} for each, tags in rows]})


def show_version(name: str, version: int) -> Response:
    found = control().store.resolve(ModelRef(check_model_name(name), version))
    manifest = control().store.manifest(found)
    return _json({"version": found, "manifest": manifest})


def show_verdict(name: str, version: int) -> Response:
    judged = control().judgement(check_model_name(name), version)
    if judged is None:
        response = _json({"state": "judging"}, 202)
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
    return _json({"lines": ledger.reigns(*moments(at)) if at else ledger.lines})


def show_audit(name: str) -> Response:
    control().store.aliases(check_model_name(name))
    lines, faults = audit(control().store, name)
    return _json({"lines": lines, "faults": faults})


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
# What programs use. Everything but the probe and the description asks for a token.
ROUTES: tuple[tuple[str, str, Callable[..., Response]], ...] = (
    ("/livez", "GET", livez),
    ("/openapi.json", "GET", openapi),
    ("/v1/models", "GET", may_look(list_models)),
    (_MODEL, "GET", may_look(show_model)),
    (f"{_MODEL}/versions", "GET", may_look(list_versions)),
    (f"{_MODEL}/versions/<int:version>", "GET", may_look(show_version)),
    (f"{_MODEL}/versions/<int:version>/verdict", "GET", may_look(show_verdict)),
    (f"{_MODEL}/traffic", "GET", may_look(show_traffic)),
    (f"{_MODEL}/history", "GET", may_look(show_history)),
    (f"{_MODEL}/audit", "GET", may_look(show_audit)),
    *((f"{_MODEL}/{verb}", "POST", may_decide(_decision(kind))) for verb, kind in BODIES.items()),
)


def _standing(name: str) -> dict[str, Any]:
    aliases, trial = control().store.standing(check_model_name(name))
    return {"name": name, "aliases": aliases, "trial": trial}


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, mimetype="application/json")


def _refuse(status: int, detail: str) -> Response:
    return Problem.of(status, "unauthorized" if status == 401 else "forbidden", detail).answer()


def describe_error(error: Exception) -> tuple[int, str, str]:
    """Status, title and detail of an error; what nobody foresaw is logged, and told nobody."""
    if isinstance(error, HTTPException):
        return error.code or 500, error.name, error.description or error.name
    if isinstance(error, domain.ConvoyError) and type(error) in STATUS:
        return STATUS[type(error)], error.title(), str(error)
    log.error("unexpected error", exc_info=error)
    return 500, "internal error", "something went wrong on our side; the log says what"


def _answer_error(error: Exception) -> Response:
    return Problem.of(*describe_error(error)).answer(error)
