"""The control plane's pages for operators. They work without JavaScript.

A visitor signs in with a token and gets a session cookie. Browsers also send the cookie with forms
of other sites. So a form must contain the session's secret and come from this origin.
"""

import base64
import hmac
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jinja2
import msgspec
from flask import (
    Blueprint,
    Flask,
    Response,
    g,
    redirect,
    render_template,
    request,
)
from werkzeug.exceptions import NotFound
from werkzeug.wrappers import Response as BaseResponse

from registry.auth.bearer import require
from registry.auth.sessions import SESSION_TTL_S, form_secret
from registry.canary.traffic_history import figures
from registry.control.addresses import relative, url_for
from registry.control.confirmation import describe
from registry.control.state import COOKIE, control_state, describe_error, report_files
from registry.core.errors import ConvoyError, ModelNotReady, PromotionRefused, UsageError
from registry.core.names import check_model_name
from registry.model.refs import ModelRef
from registry.promotion.decision_requests import (
    CanaryStart,
    CanaryStop,
    DecisionRequest,
    Promotion,
    RollBack,
)
from registry.promotion.decisions import NO_CHAMPION
from registry.promotion.gate_runner import GateResult
from registry.promotion.policy import read_policy

blueprint = Blueprint("pages", __name__)


def init_app(app: Flask) -> None:
    """Add the pages to ``app``, with the filters and the ``url_for`` of their templates."""
    app.register_blueprint(blueprint)
    app.jinja_env.filters.update(FILTERS)
    app.jinja_env.globals.update(url_for=url_for)


def gate_result_page(result: GateResult) -> str:
    """A gate result as one HTML file, with its style and its pictures in it."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder / "templates"), autoescape=True
    )
    environment.filters.update(FILTERS)
    style = (folder / "static" / "style.css").read_text()
    return environment.get_template("gate_result_alone.html").render(result=result, style=style)


def ask_to_sign_in() -> BaseResponse:
    """Redirect a visitor without a session to the sign-in page, which leads back to this one."""
    return redirect(url_for("pages.sign_in", next=request.path), 303)


@blueprint.context_processor
def _for_forms() -> dict[str, str]:
    return {"csrf": form_secret(_cookie())}


@blueprint.errorhandler(Exception)
def show_error(error: Exception) -> tuple[str, int]:
    """The page that describes an error, with its HTTP status; also for unexpected errors."""
    status, title, detail = describe_error(error)
    return render_template("error.html", title=title, detail=detail), status


@blueprint.get("/login")
def sign_in() -> str:
    """The sign-in form. It keeps ``next``, the path to which a sign-in leads."""
    return render_template("login.html", next=request.args.get("next", ""), failed=False)


@blueprint.post("/login")
def signed_in() -> Any:
    """Start a session for the token in the form, and redirect to the form's ``next`` by 303.

    Without a known token that may view, the answer is the form again, with 401. A ``next`` on
    another site leads to the list of models instead.

    Raises:
        UsageError: another site sent the form.
    """
    _check_origin()
    token = control_state().tokens.find(request.form.get("token", "").strip())
    target = request.form.get("next", "")
    if token is None or not token.may("view"):
        return render_template("login.html", next=target, failed=True), 401
    # Never redirect to another site: a browser reads "//host" and "/\\host" as another host.
    is_local = re.fullmatch(r"/(?![/\\])[A-Za-z0-9/_.-]*", target)
    response = redirect(relative(target) if is_local else url_for("pages.show_models"), 303)
    response.set_cookie(
        COOKIE,
        control_state().sessions.begin(token.sha256),
        max_age=SESSION_TTL_S,
        secure=os.environ.get("CONVOY_CONTROL_HTTPS") == "1",
        httponly=True,
        samesite="Strict",
    )
    return response


@blueprint.post("/logout")
def sign_out() -> Any:
    """End the session, delete its cookie, and redirect to the sign-in form by 303.

    Raises:
        UsageError: the form is from another site or another session.
    """
    _check_form()
    control_state().sessions.end(_cookie())
    response = redirect(url_for("pages.sign_in"), 303)
    response.delete_cookie(COOKIE, httponly=True, samesite="Strict")
    return response


@blueprint.get("/")
def show_models() -> str:
    """The page of all models, each with its aliases and its canary."""
    store = control_state().store
    rows = [(name, *store.aliases.read_with_canary(name)) for name in store.models()]
    return render_template("models.html", rows=rows)


@blueprint.get("/models/<name>")
def show_model(name: str) -> str:
    """The page of one model: versions, canary, traffic, and the audit log, newest line first."""
    return _model_page(name)


@blueprint.get("/models/<name>/traffic")
def show_traffic(name: str) -> str:
    """The part of a model's page that shows its traffic; the page's script polls it.

    If a service cannot be reached, this part says so, and the status is 200 nevertheless.
    """
    return render_template("traffic.html", **_traffic(check_model_name(name)))


@blueprint.get("/models/<name>/versions/<int:version>")
def show_version(name: str, version: int) -> str:
    """The page of one version: its manifest, its training report and its gate result.

    The first request starts the gate, unless the version is the champion or the model has no
    champion. Until the gate has ended, the page's script polls the API.
    """
    return _version_page(name, version)


@blueprint.get("/models/<name>/versions/<int:version>/report/<file>")
def show_report(name: str, version: int, file: str) -> Response:
    """A picture of the version's training report."""
    found = control_state().store.resolve(ModelRef(check_model_name(name), version))
    picture = control_state().picture(found, f"report/{file}")
    if picture is None:
        raise NotFound
    response = Response(picture, mimetype="image/png")
    response.headers["Cache-Control"] = "private, max-age=86400"
    return response


@blueprint.post("/models/<name>/decide")
def decide(name: str) -> Any:
    """Carry out a form's decision; if it is not confirmed yet, show what it will change."""
    _check_form()
    version = _number("version")
    require(g.visitor, "decide")
    try:
        decision = _read_form(request.form.get("action", ""), version)
        if "confirmed" not in request.form:
            return _confirm_page(name, decision)
        control_state().carry_out(decision, name, g.visitor.name)
    except ConvoyError as error:
        status, _, detail = describe_error(error)
        if version is not None and isinstance(error, PromotionRefused):
            return _version_page(name, version, detail), status
        return _model_page(name, detail), status
    return redirect(url_for("pages.show_model", name=name), 303)


def _read_form(action: str, version: int | None) -> DecisionRequest:
    """The decision in the form; raises ``UsageError`` if a field is missing or wrong."""
    reason = request.form.get("reason", "").strip() or None
    expected = _number("expect_champion")
    if action in ("promote", "force") and version is not None:
        return Promotion(
            version=version,
            force=action == "force",
            allow_new_classes="allow_new_classes" in request.form,
            expect_champion=expected,
            reason=reason,
        )
    if action == "start-canary" and version is not None:
        return CanaryStart(
            challenger=version,
            share=_percent("share"),
            shadow=_percent("shadow"),
            expect_champion=expected,
            reason=reason,
        )
    if action == "stop-canary":
        return CanaryStop(expect_challenger=version, reason=reason)
    if action == "roll-back":
        return RollBack(
            expect_champion=expected, expect_previous=_number("expect_previous"), reason=reason
        )
    raise UsageError(
        f"the form's action {action!r} is unknown, or needs a version; "
        "use promote, force, start-canary, stop-canary or roll-back"
    )


def _confirm_page(name: str, decision: DecisionRequest) -> str:
    store = control_state().store
    aliases, canary = store.aliases.read_with_canary(check_model_name(name))
    champion = getattr(decision, "expect_champion", None) or aliases.get("champion")
    # A roll-back goes by the log; the alias may have been moved outside Convoy.
    previous = store.audit_logs.read(name).previous or aliases.get("previous")
    confirmation = describe(decision, champion, previous, canary)
    fields = {key: value for key, value in request.form.items() if key != "reason"}
    # ``carry_out`` refuses the decision if the versions that this page names have changed.
    if not isinstance(decision, CanaryStop):
        fields["expect_champion"] = str(champion or NO_CHAMPION)
    if isinstance(decision, RollBack) and previous is not None:
        fields["expect_previous"] = str(previous)
    names_version = isinstance(decision, Promotion | CanaryStart)
    return render_template(
        "confirm.html",
        name=name,
        question=confirmation.question,
        changes=confirmation.changes,
        button=confirmation.button,
        kind="warn" if confirmation.is_risky else "",
        needs_reason=isinstance(decision, Promotion) and decision.force,
        reason=decision.reason or "",
        fields=list(fields.items()),
        back=url_for("pages.show_version", name=name, version=_number("version"))
        if names_version
        else url_for("pages.show_model", name=name),
    )


def _model_page(name: str, error: str | None = None) -> str:
    store = control_state().store
    versions = store.versions(check_model_name(name))
    aliases, canary = store.aliases.read_with_canary(name)
    lines = list(reversed(store.audit_logs.read(name).lines))
    return render_template(
        "model.html",
        name=name,
        versions=versions,
        aliases=aliases,
        canary=canary,
        lines=lines,
        error=error,
        **_traffic(name),
    )


def _version_page(name: str, version: int, error: str | None = None) -> str:
    store = control_state().store
    found = store.resolve(ModelRef(check_model_name(name), version))
    manifest = store.manifest(found)
    aliases, canary = store.aliases.read_with_canary(name)
    champion = aliases.get("champion")
    result = control_state().gate_result(name, version) if champion not in (None, version) else None
    return render_template(
        "version.html",
        name=name,
        found=found,
        manifest=manifest,
        pictures=[file.removeprefix("report/") for file in report_files(manifest)],
        champion=champion,
        canary=canary,
        result=result,
        policy=read_policy(control_state().paths.policy(name)),
        error=error,
    )


def _traffic(name: str) -> dict[str, Any]:
    """The values for ``traffic.html``: newest sample, charts, and the change since the oldest."""
    try:
        samples = control_state().history.samples(name)
    except ModelNotReady as error:
        return {"status": None, "status_error": str(error)}
    (first_s, first), (latest_s, latest) = samples[0], samples[-1]
    return {
        "status": latest,
        "figures": msgspec.to_builtins(figures(samples)),
        "window_s": latest_s - first_s,
        "recent": lambda version: latest.of(version).since(first.of(version)),
    }


def _check_form() -> None:
    """Raise ``UsageError`` for a form of another site, which cannot know the session's secret."""
    _check_origin()
    sent, known = request.form.get("csrf", ""), form_secret(_cookie())
    if not hmac.compare_digest(sent.encode(errors="replace"), known.encode()):
        raise UsageError("the form belongs to another session; go back and reload the page")


def _check_origin() -> None:
    origin = request.headers.get("Origin")
    if request.headers.get("Sec-Fetch-Site") == "cross-site" or (
        origin is not None and urlsplit(origin).netloc != request.host
    ):
        raise UsageError("another site sent the form; use the form on the control plane's page")


def _number(field: str) -> int | None:
    text = request.form.get(field, "")
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def _percent(field: str) -> float:
    text = request.form.get(field, "").strip().removesuffix("%") or "0"
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,6})?", text) or float(text) > 100:
        raise UsageError(f"{field} is {text[:20]!r}; write a percentage from 0 to 100")
    return float(text) / 100


def _cookie() -> str:
    return request.cookies.get(COOKIE, "")


def _data_uri(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _moment(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M")


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _drawing(file: str) -> str:
    """What a report's picture shows: ``confusion matrix`` for ``confusion_matrix.png``."""
    return file.removesuffix(".png").replace("_", " ")


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.3g} ms"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


FILTERS: dict[str, Callable[..., str]] = {
    "data_uri": _data_uri,
    "moment": _moment,
    "drawing": _drawing,
    "figure": _figure,
    "milliseconds": _milliseconds,
    "share": _share,
}
