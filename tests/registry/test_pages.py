"""The control plane's pages: which decisions forms may make, and the pages in a real Chromium."""

import html
import itertools
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import mlflow
import pytest
from flask import Flask
from flask.testing import FlaskClient
from msgspec.structs import replace
from playwright.sync_api import Browser, Page
from werkzeug.serving import make_server

from registry.auth.sessions import MAX_SESSIONS_OF_A_TOKEN, SESSION_TTL_S, Sessions
from registry.canary import traffic_history
from registry.canary.traffic_history import TrafficHistory, figures
from registry.canary.traffic_stats import ServingStatus, VersionTraffic, WorkerReport
from registry.control import state
from registry.control.app import create_app
from registry.core.errors import ModelNotReady, RegistryUnavailable
from registry.core.paths import Paths
from registry.model.refs import Canary
from registry.promotion.gate_runner import GateRunner
from registry.promotion.promotion import promote, roll_back, start_canary
from registry.store.mlflow_store import ModelStore
from tests.browsing import assert_readable
from tests.conftest import NewPage, Publish, wait_for


@pytest.fixture
def app(store: ModelStore, registry_paths: Paths, monkeypatch: pytest.MonkeyPatch) -> Flask:
    worker = WorkerReport(pid=7, model="digits", version=1, generation=1)
    samples = itertools.count(1)

    def read(services: tuple[str, ...], name: str) -> ServingStatus:
        count = 10 * next(samples)
        return ServingStatus(
            model="digits",
            generation=1,
            champion=1,
            challenger=2,
            workers=(worker,),
            versions=tuple(
                VersionTraffic(
                    version=number, requests=number * count, buckets=((0.005, number * count),)
                )
                for number in (1, 2)
            ),
        )

    monkeypatch.setattr(state, "read_serving_status", read)
    app = create_app(store, registry_paths, ("http://somewhere",))
    app.extensions["convoy"].gate_runner = GateRunner(store, registry_paths, {}, timed=False)
    return app


@pytest.fixture
def promoted(store: ModelStore, publish: Publish, better_and_worse_seed: tuple[int, int]) -> None:
    """Version 1 is worse, version 2 is better and champion, version 3 is as bad as version 1."""
    better, worse = better_and_worse_seed
    for seed in (worse, better, worse):
        publish(seed=seed)
    promote(store, "digits", 1)
    promote(store, "digits", 2)


@pytest.fixture
def tokens(app: Flask) -> dict[str, str]:
    found = app.extensions["convoy"].tokens
    return {role: found.add(role, role) for role in ("viewer", "admin")}


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


def sign_in(client: FlaskClient, token: str, target: str = "") -> str:
    """Sign in; return the session's secret, which its forms contain."""
    answer = client.post("/login", data={"token": token, "next": target})
    assert answer.status_code == 303
    found = re.search(r'name="csrf" value="([^"]+)"', client.get("/").text)
    assert found is not None
    return found[1]


def up(path: str) -> str:
    """The relative address of the root from the page at ``path``."""
    return "../" * (path.count("/") - 1)


def test_pages_stay_below_the_path_of_a_proxy(
    client: FlaskClient, promoted: None, tokens: dict[str, str]
) -> None:
    sign_in(client, tokens["admin"])
    for path in ("/login", "/", "/models/digits", "/models/digits/versions/2"):
        text = client.get(path).text
        addresses = re.findall(r'(?:src|href|action|data-from)="([^"]+)"', text)
        found = {urljoin(f"https://host/convoy{path}", each) for each in addresses}
        linked = {each for each in found if not each.startswith("data:")}
        assert linked
        assert all(each.startswith("https://host/convoy/") for each in linked)
        for each in linked:
            with client.get(each.removeprefix("https://host/convoy")) as answer:
                assert answer.status_code in (200, 405)  # 405: a form's address takes only POST


def test_pages_need_a_sign_in_with_a_token(
    client: FlaskClient, promoted: None, tokens: dict[str, str]
) -> None:
    for path in ("/", "/models/digits", "/models/digits/versions/3", "/models/digits/traffic"):
        answer = client.get(path)
        assert answer.status_code == 303
        assert answer.headers["Location"] == f"{up(path)}login?next={path}"
    assert client.post("/login", data={"token": "convoy_guess"}).status_code == 401
    answer = client.post("/login", data={"token": tokens["viewer"], "next": "/models/digits"})
    assert answer.headers["Location"] == "models/digits"
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert tokens["viewer"] not in cookie
    assert "digits" in client.get("/").text


def test_many_sessions_of_one_token_do_not_end_those_of_another(paths: Paths) -> None:
    sessions = Sessions(paths.sessions)
    other = sessions.begin("a" * 64)
    cookies = [sessions.begin("b" * 64) for _ in range(MAX_SESSIONS_OF_A_TOKEN + 2)]
    assert sessions.find(other) is not None
    assert [cookie for cookie in cookies if sessions.find(cookie)] == cookies[2:]


def test_the_oldest_session_ends_when_there_are_too_many(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.auth.sessions.MAX_SESSIONS", 3)
    sessions = Sessions(paths.sessions)
    cookies = [sessions.begin(digit * 64) for digit in "1234"]
    assert [cookie for cookie in cookies if sessions.find(cookie)] == cookies[1:]


@pytest.mark.parametrize("target", ["//evil.example", "/\\evil.example", "https://evil.example"])
def test_signing_in_leads_to_no_other_site(
    client: FlaskClient, tokens: dict[str, str], target: str
) -> None:
    answer = client.post("/login", data={"token": tokens["viewer"], "next": target})
    assert answer.headers["Location"] == "./"


def test_a_removed_token_ends_its_session(
    client: FlaskClient, app: Flask, tokens: dict[str, str]
) -> None:
    sign_in(client, tokens["viewer"])
    app.extensions["convoy"].tokens.remove("viewer")
    assert client.get("/").status_code == 303


def test_a_copied_cookie_is_worthless_after_the_visitor_signs_out(
    client: FlaskClient, app: Flask, promoted: None, tokens: dict[str, str], store: ModelStore
) -> None:
    csrf = sign_in(client, tokens["admin"])
    copied = client.get_cookie("convoy")
    assert copied is not None
    assert client.post("/logout", data={"csrf": csrf}).status_code == 303
    assert client.get_cookie("convoy") is None
    thief = app.test_client()
    thief.set_cookie("convoy", copied.value)
    assert thief.get("/").headers["Location"].startswith("login")
    before = len(store.audit_logs.read("digits").lines)
    form = {"action": "roll-back", "csrf": csrf, "confirmed": "yes"}
    answer = thief.post("/models/digits/decide", data=form)
    assert answer.headers["Location"].startswith("../../login")
    assert len(store.audit_logs.read("digits").lines) == before


def test_a_session_survives_a_restart_and_the_end_of_another_session(
    client: FlaskClient,
    app: Flask,
    tokens: dict[str, str],
    store: ModelStore,
    registry_paths: Paths,
) -> None:
    sign_in(client, tokens["viewer"])
    cookie = client.get_cookie("convoy")
    assert cookie is not None
    assert registry_paths.sessions.stat().st_mode & 0o777 == 0o600
    assert cookie.value not in registry_paths.sessions.read_text()
    other = app.test_client()
    other.post("/logout", data={"csrf": sign_in(other, tokens["viewer"])})
    restarted = create_app(store, registry_paths).test_client()
    restarted.set_cookie("convoy", cookie.value)
    assert restarted.get("/").status_code == 200


@pytest.mark.parametrize("content", [b"", b"[", b"[" * 5000, b'[{"cookie_sha256": "x"}]'])
def test_visitors_can_sign_in_when_the_file_of_sessions_is_damaged(
    client: FlaskClient, tokens: dict[str, str], registry_paths: Paths, content: bytes
) -> None:
    sign_in(client, tokens["viewer"])
    registry_paths.sessions.write_bytes(content)
    assert client.get("/").status_code == 303
    sign_in(client, tokens["viewer"])
    assert client.get("/").status_code == 200


def test_a_session_ends_after_its_time(
    client: FlaskClient, tokens: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(client, tokens["viewer"])
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + SESSION_TTL_S + 1)
    assert client.get("/").status_code == 303


def test_a_token_that_may_only_classify_opens_no_page(
    client: FlaskClient, app: Flask, promoted: None, tokens: dict[str, str]
) -> None:
    known = app.extensions["convoy"].tokens
    caller = known.add("caller", "classify")
    assert client.post("/login", data={"token": caller}).status_code == 401
    sign_in(client, tokens["viewer"])
    client.set_cookie("convoy", app.extensions["convoy"].sessions.begin(known.find(caller).sha256))
    for path in ("/", "/models/digits", "/models/digits/versions/3", "/models/digits/traffic"):
        assert client.get(path).status_code == 303


def test_a_session_accepts_decisions_only_from_its_own_forms(
    client: FlaskClient, promoted: None, tokens: dict[str, str], store: ModelStore
) -> None:
    csrf = sign_in(client, tokens["admin"])
    good = {"action": "roll-back", "csrf": csrf, "confirmed": "yes"}
    path = "/models/digits/decide"
    before = len(store.audit_logs.read("digits").lines)
    for data, headers in (
        ({**good, "csrf": ""}, {}),
        ({**good, "csrf": "x"}, {}),
        ({"action": "roll-back"}, {}),
        (good, {"Origin": "https://evil.example"}),
        (good, {"Origin": "null"}),
        (good, {"Sec-Fetch-Site": "cross-site"}),
    ):
        assert client.post(path, data=data, headers=headers).status_code == 400
    # The API accepts no decision from a cookie.
    assert client.post("/v1/models/digits/roll-back", json={}).status_code == 401
    assert len(store.audit_logs.read("digits").lines) == before
    assert client.post(path, data=good, headers={"Origin": "http://localhost"}).status_code == 303
    assert store.aliases.read("digits")["champion"] == 1


def test_a_viewer_sees_no_forms_and_decides_nothing(
    client: FlaskClient, promoted: None, tokens: dict[str, str], store: ModelStore
) -> None:
    csrf = sign_in(client, tokens["viewer"])
    assert "/decide" not in client.get("/models/digits").text
    before = len(store.audit_logs.read("digits").lines)
    answer = client.post("/models/digits/decide", data={"action": "roll-back", "csrf": csrf})
    assert answer.status_code == 403  # without a question first
    assert "may view, not decide" in answer.text
    assert len(store.audit_logs.read("digits").lines) == before


@pytest.mark.parametrize(
    ("form", "status", "text"),
    [
        ({"action": "start-canary", "version": "3", "share": "200"}, 400, "from 0 to 100"),
        ({"action": "start-canary", "version": "3"}, 400, "a share of the requests"),
        ({"action": "explode"}, 400, "is unknown, or needs a version"),
        ({"action": "promote", "version": "1"}, 422, "is refused"),
        ({"action": "promote", "version": "1", "expect_champion": "9"}, 409, "not 9"),
        ({"action": "force", "version": "1"}, 400, "needs"),
    ],
)
def test_the_page_shows_why_a_decision_failed(
    client: FlaskClient,
    promoted: None,
    tokens: dict[str, str],
    form: dict[str, str],
    status: int,
    text: str,
) -> None:
    csrf = sign_in(client, tokens["admin"])
    answer = client.post("/models/digits/decide", data={**form, "csrf": csrf, "confirmed": "yes"})
    assert answer.status_code == status
    assert text in answer.text
    assert 'role="alert"' in answer.text


def test_promoting_a_version_with_other_classes_needs_the_operators_consent(
    client: FlaskClient,
    app: Flask,
    promoted: None,
    publish: Publish,
    tokens: dict[str, str],
    store: ModelStore,
    better_and_worse_seed: tuple[int, int],
) -> None:
    better, _ = better_and_worse_seed
    publish(seed=better, change=lambda each: replace(each, labels=tuple("abcdefghij")))
    app.extensions["convoy"].gate_runner.run(*store.champion_and_candidate("digits", 4))
    csrf = sign_in(client, tokens["admin"])
    page = client.get("/models/digits/versions/4").text
    assert "Clients will see" in page
    assert "labels that are renamed: &#39;0&#39; → &#39;a&#39;" in page
    assert 'name="allow_new_classes" required' in page
    form = {"action": "promote", "version": "4", "csrf": csrf, "confirmed": "yes"}
    assert client.post("/models/digits/decide", data=form).status_code == 422
    allowed = {**form, "allow_new_classes": "on"}
    assert client.post("/models/digits/decide", data=allowed).status_code == 303
    assert store.aliases.read("digits")["champion"] == 4


def test_pages_escape_text_that_others_wrote(
    client: FlaskClient, promoted: None, tokens: dict[str, str], store: ModelStore
) -> None:
    roll_back(store, "digits", "<script>alert(1)</script>")
    sign_in(client, tokens["viewer"])
    page = client.get("/models/digits").text
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert client.get("/models/digits/versions/1/report/..%2fmanifest.json").status_code == 404
    assert client.get("/models/digits/versions/1/report/nothing.png").status_code == 404
    assert client.get("/models/%3Cb%3E").status_code == 400


def test_charts_show_the_change_between_two_samples() -> None:
    def status(requests: int) -> ServingStatus:
        version = VersionTraffic(version=1, requests=requests, buckets=((0.004, requests),))
        return ServingStatus(model="m", generation=1, champion=1, versions=(version,))

    found = figures([(0.0, status(100)), (2.0, status(140)), (4.0, status(140))])
    assert found.seconds == [-2.0, 0.0]
    requests, median, errors = (chart.series for chart in found.charts)
    assert [(each.role, each.version, each.values) for each in requests] == [
        ("champion", 1, [20.0, 0.0])
    ]
    assert median[0].values == [pytest.approx(2.0), None]  # no answer in the last two seconds
    assert errors[0].values == [0.0, 0.0]


def test_every_model_is_sampled_while_no_page_is_open() -> None:
    reads: list[str] = []
    stop = threading.Event()

    def read(name: str) -> ServingStatus:
        reads.append(name)
        if name == "not served":
            raise ModelNotReady("the service does not serve it")
        if len(reads) > 3:
            stop.set()
        return ServingStatus(model=name, generation=1, champion=1)

    history = TrafficHistory(read)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traffic_history, "SAMPLE_INTERVAL_S", 0.0)
        history.watch(lambda: ["not served", "digits"], stop)
        assert len(history.samples("digits")) >= 2
    assert {"not served", "digits"} == set(reads)


def test_sampling_continues_after_the_registry_was_away(caplog: pytest.LogCaptureFixture) -> None:
    stop = threading.Event()
    calls: list[int] = []

    def names() -> list[str]:
        calls.append(1)
        if len(calls) < 3:
            raise RegistryUnavailable("the registry is away")
        stop.set()
        return ["digits"]

    history = TrafficHistory(lambda name: ServingStatus(model=name, generation=1, champion=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traffic_history, "SAMPLE_INTERVAL_S", 0.0)
        history.watch(names, stop)
    assert [record.getMessage() for record in caplog.records] == [
        "cannot sample the traffic: the registry is away"
    ]


@pytest.mark.parametrize(
    ("form", "texts"),
    [
        (
            {"action": "promote", "version": "3", "expect_champion": "2"},
            ["promote version 3?", "from version 2 to version 3", "may refuse"],
        ),
        (
            {"action": "force", "version": "3"},
            ["against the gate", "from version 2 to version 3", "You override", "required"],
        ),
        ({"action": "roll-back"}, ["from version 2 to version 1", "The gate does not run"]),
        (
            {"action": "start-canary", "version": "3", "share": "25"},
            ["version 3 on 25 % of the requests", "Version 2 stays the champion"],
        ),
        ({"action": "stop-canary"}, ["There is no canary now", "Version 2, the champion"]),
    ],
)
def test_a_decision_needs_a_confirmation_on_a_page_that_says_what_changes(
    client: FlaskClient,
    promoted: None,
    tokens: dict[str, str],
    store: ModelStore,
    form: dict[str, str],
    texts: list[str],
) -> None:
    csrf = sign_in(client, tokens["admin"])
    before = len(store.audit_logs.read("digits").lines)
    answer = client.post("/models/digits/decide", data={**form, "csrf": csrf})
    assert answer.status_code == 200
    assert all(text in answer.text for text in texts)
    assert len(store.audit_logs.read("digits").lines) == before
    sent = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', answer.text))
    assert form.items() <= sent.items()
    assert sent["confirmed"] == "yes"


def test_a_confirmed_roll_back_goes_only_where_the_page_said(
    client: FlaskClient, promoted: None, tokens: dict[str, str], store: ModelStore
) -> None:
    csrf = sign_in(client, tokens["admin"])
    confirmed = confirm_roll_back(client, csrf)
    assert (confirmed["expect_champion"], confirmed["expect_previous"]) == ("2", "1")
    # Meanwhile another operator promotes version 3 and rolls back: 2 serves again, after 3.
    promote(store, "digits", 3, force=True, reason="a race")
    roll_back(store, "digits")
    answer = client.post("/models/digits/decide", data=confirmed)
    assert answer.status_code == 409
    assert "the previous champion is version 3, not 1" in html.unescape(answer.text)
    assert store.aliases.read("digits")["champion"] == 2


def test_a_roll_back_works_after_the_champions_version_was_deleted(
    client: FlaskClient, promoted: None, tokens: dict[str, str], store: ModelStore
) -> None:
    mlflow.MlflowClient().delete_model_version("digits", "2")
    confirmed = confirm_roll_back(client, sign_in(client, tokens["admin"]))
    assert (confirmed["expect_champion"], confirmed["expect_previous"]) == ("0", "1")
    assert client.post("/models/digits/decide", data=confirmed).status_code == 303
    assert store.aliases.read("digits")["champion"] == 1


def confirm_roll_back(client: FlaskClient, csrf: str) -> dict[str, str]:
    """The fields of the page that asks whether to roll back."""
    form = {"action": "roll-back", "csrf": csrf}
    page = client.post("/models/digits/decide", data=form).text
    return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page))


def test_the_confirmation_of_a_promotion_names_the_canary_that_it_stops(
    client: FlaskClient, promoted: None, tokens: dict[str, str], store: ModelStore
) -> None:
    start_canary(store, "digits", Canary(version=3, share=0.1))
    form = {"action": "promote", "version": "3", "csrf": sign_in(client, tokens["admin"])}
    page = client.post("/models/digits/decide", data=form).text
    assert "The canary version 3 on 10 % of the requests stops." in page


@pytest.fixture
def url(app: Flask) -> Iterator[str]:
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def signed_in(page: Any, url: str, token: str, path: str = "/") -> Any:
    page.goto(url + path)
    page.fill("input[name=token]", token)
    page.click("main button")
    return page


@pytest.mark.slow
@pytest.mark.browser
def test_an_operator_promotes_is_refused_overrides_and_rolls_back(
    watched_page: tuple[Page, list[str]],
    url: str,
    promoted: None,
    tokens: dict[str, str],
    store: ModelStore,
) -> None:
    page, faults = watched_page
    signed_in(page, url, tokens["admin"], "/models/digits")
    assert page.text_content("h1") == "digits"
    assert "worker" in page.inner_text("#traffic").lower()
    page.click("table a >> text=3")
    page.wait_for_selector("text=Refused: version 3")
    assert page.locator(".sheet img").count() > 0
    assert page.evaluate("document.querySelector('.sheet img').naturalWidth") == 8
    page.click("text=Ask the gate again")
    faults.clear()
    page.click("text=Yes, promote version 3")
    assert "is refused" in page.inner_text("[role=alert]")
    assert all("422" in fault for fault in faults)
    faults.clear()
    page.click("text=Override the gate")
    page.click("text=Yes, override and promote version 3")
    assert page.url.endswith("/decide")  # the browser itself asks for the reason
    page.fill("input[name=reason]", "as a test")
    page.click("text=Yes, override and promote version 3")
    page.wait_for_url(f"{url}/models/digits")
    assert store.aliases.read("digits") == {"champion": 3, "previous": 2}
    page.click("button >> text=Roll back")
    page.fill("input[name=reason]", "enough")
    page.click("text=Yes, roll back to version 2")
    page.wait_for_selector("tr.champion >> text=2")
    assert store.aliases.read("digits")["champion"] == 2
    page.click("table a >> text=1")
    page.wait_for_selector("text=Start the canary")
    page.fill("input[name=share]", "25")
    page.click("text=Start the canary")
    page.click("text=Yes, start the canary")
    page.wait_for_selector("text=Canary: version 1 on 25 % of the requests")
    page.click("text=Stop the canary")
    page.click("text=Yes, stop the canary")
    page.wait_for_selector("text=canary stopped")
    actions = [line.entry.action for line in store.audit_logs.read("digits").lines]
    assert actions[2:] == ["refused", "forced", "rolled back", "canary started", "canary stopped"]
    assert {line.entry.by for line in store.audit_logs.read("digits").lines[2:]} == {"admin"}
    page.click("text=sign out")
    assert "/login" in page.url
    assert faults == []


@pytest.mark.browser
def test_charts_have_their_points_when_the_page_opens(
    watched_page: tuple[Page, list[str]],
    url: str,
    app: Flask,
    promoted: None,
    tokens: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page, faults = watched_page
    now = time.monotonic()
    for at_s in (now - 4, now - 2):  # as if the history had sampled for four seconds
        with monkeypatch.context() as patch:
            patch.setattr(traffic_history, "monotonic", lambda at_s=at_s: at_s)
            app.extensions["convoy"].history.samples("digits")
    signed_in(page, url, tokens["viewer"], "/models/digits")
    page.wait_for_selector("#charts figure:nth-of-type(3) canvas")  # the script has drawn
    assert page.locator("#charts canvas").count() == 3
    lengths = "plots.map((plot) => plot.data.map((values) => values.length))"
    before = page.evaluate(lengths)
    assert all(len(lines) == 3 and min(lines) >= 2 for lines in before)  # time and two versions
    assert page.evaluate("plots[0].data[1].every((rate) => rate > 0)")
    drawn = """() => {
        const canvas = document.querySelector("#charts canvas");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return new Set(new Uint32Array(data.buffer)).size;
    }"""
    assert page.evaluate(drawn) > 10  # colours: axes, and a line for each version
    wait_for(lambda: page.evaluate(lengths)[0][0] > before[0][0], "no newer points came")
    assert faults == []


@pytest.mark.browser
def test_a_button_shows_that_its_request_runs_and_cannot_be_pressed_again(
    watched_page: tuple[Page, list[str]],
    url: str,
    promoted: None,
    tokens: dict[str, str],
    store: ModelStore,
) -> None:
    page, faults = watched_page
    signed_in(page, url, tokens["admin"], "/models/digits")
    page.click("button >> text=Roll back")
    # The form is not sent, so that the page stays as it is while a request runs.
    page.evaluate("addEventListener('submit', (event) => event.preventDefault())")
    page.click("text=Yes, roll back to version 1")
    page.wait_for_selector("button:disabled >> text=Working: 1 s")
    assert page.text_content("#progress") == "Working …"
    assert store.aliases.read("digits")["champion"] == 2
    assert faults == []


@pytest.mark.browser
def test_no_page_scrolls_sideways_on_a_phone_or_is_hard_to_read(
    new_page: NewPage,
    url: str,
    publish: Publish,
    promoted: None,
    tokens: dict[str, str],
    store: ModelStore,
) -> None:
    roll_back(store, "digits", "a_reason_without_any_space_" * 10)
    start_canary(store, "digits", Canary(version=3, share=0.1, shadow=0.5))
    for scheme in ("light", "dark"):
        page, faults = new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
        page.goto(f"{url}/login")
        assert_readable(page)
        signed_in(page, url, tokens["admin"])
        for path in ("/", "/models/digits", "/models/digits/versions/3"):
            page.goto(url + path)
            if path.endswith("/3"):
                page.wait_for_selector(".gate-result")
            assert_readable(page)
        page.locator(".decide button").first.click()
        assert_readable(page)
        assert faults == []


@pytest.mark.browser
def test_reading_and_deciding_need_no_javascript(
    browser: Browser, url: str, promoted: None, tokens: dict[str, str], store: ModelStore
) -> None:
    page = browser.new_context(java_script_enabled=False).new_page()
    signed_in(page, url, tokens["admin"])
    page.click("text=digits")
    assert "champion" in page.inner_text("#traffic")
    assert "requests a second" in page.inner_text("#traffic")
    page.goto(f"{url}/models/digits/versions/3")
    page.wait_for_selector("text=Refused: version 3")
    page.goto(f"{url}/models/digits")
    page.click("button >> text=Roll back")
    assert store.aliases.read("digits")["champion"] == 2  # the page asks first
    page.click("text=Cancel")
    page.click("button >> text=Roll back")
    page.click("text=Yes, roll back to version 1")
    assert store.aliases.read("digits")["champion"] == 1


def test_a_reports_pictures_have_a_description_for_screen_readers(
    client: FlaskClient, publish: Publish, tokens: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "confusion_matrix.png").write_bytes(b"png")
    publish(seed=5)
    sign_in(client, tokens["viewer"])
    page = client.get("/models/digits/versions/1").text
    assert 'alt="confusion matrix of version 1"' in page


def test_a_reports_pictures_are_downloaded_once_for_concurrent_requests(
    client: FlaskClient,
    app: Flask,
    publish: Publish,
    tokens: dict[str, str],
    tmp_path: Path,
    downloads: list[int],
) -> None:
    report = tmp_path / "report"
    report.mkdir()
    for name in ("a.png", "b.png"):
        (report / name).write_bytes(name.encode())
    publish(seed=5)
    sign_in(client, tokens["viewer"])
    found: list[tuple[int, bytes]] = []

    def ask(name: str) -> None:
        visitor = app.test_client()
        visitor.post("/login", data={"token": tokens["viewer"]})
        answer = visitor.get(f"/models/digits/versions/1/report/{name}")
        found.append((answer.status_code, answer.data))

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("a.png", "b.png") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(200, b"a.png")] * 3 + [(200, b"b.png")] * 3
    assert downloads == [1]


def test_concurrent_viewers_cause_one_sample() -> None:
    reads: list[int] = []

    def read(name: str) -> ServingStatus:
        reads.append(1)
        return ServingStatus(model=name, generation=1, champion=1)

    history = TrafficHistory(read)
    threads = [threading.Thread(target=history.samples, args=("m",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    assert len(history.samples("m")) == 1
