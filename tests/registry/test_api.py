"""The control plane's API: what it answers, and which token may do what."""

import re
import threading
from typing import Any

import msgspec
import pytest
from flask import Flask
from flask.testing import FlaskClient
from msgspec.structs import replace

from registry.canary.traffic_stats import ServingStatus, VersionTraffic
from registry.control import api, state
from registry.control.app import PUBLIC, create_app
from registry.control.openapi import document
from registry.core.errors import ModelNotReady, RegistryUnavailable
from registry.core.paths import Paths
from registry.model.refs import Canary
from registry.promotion.gate_runner import GateRunner
from registry.promotion.promotion import promote
from registry.store.mlflow_store import ModelStore
from tests.conftest import WAIT_TIMEOUT_S, Publish
from training.data.sources import Dataset

OPEN = {"/livez", "/openapi.json"}


@pytest.fixture
def app(store: ModelStore, registry_paths: Paths) -> Flask:
    app = create_app(store, registry_paths, ("http://somewhere",))
    control = app.extensions["convoy"]
    control.gate_runner = GateRunner(store, registry_paths, {}, timed=False)
    return app


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def headers(app: Flask) -> dict[str, dict[str, str]]:
    """The headers that a viewer and an operator send."""
    tokens = app.extensions["convoy"].tokens
    return {
        role: {"Authorization": f"Bearer {tokens.add(role, role)}"} for role in ("viewer", "admin")
    }


@pytest.fixture
def promoted(store: ModelStore, publish: Publish, better_and_worse_seed: tuple[int, int]) -> None:
    """Version 1 is champion, version 2 is better."""
    better, worse = better_and_worse_seed
    publish(seed=worse)
    publish(seed=better)
    promote(store, "digits", 1)


def wait_for_gates() -> None:
    for thread in threading.enumerate():
        if thread.name == "gate":
            thread.join(WAIT_TIMEOUT_S)


def routes() -> list[tuple[str, str]]:
    return [(rule.replace("<name>", "digits"), method) for rule, method, _ in api.ROUTES]


@pytest.mark.parametrize(("rule", "method"), routes())
def test_every_route_needs_a_token_with_the_right_role(
    client: FlaskClient,
    headers: dict[str, dict[str, str]],
    promoted: None,
    store: ModelStore,
    rule: str,
    method: str,
) -> None:
    path = rule.replace("<int:version>", "2")
    if path in OPEN:
        assert client.open(path, method=method).status_code == 200
        return
    before = len(store.audit_logs.read("digits").lines)
    for sent in (
        {},
        {"Authorization": "Bearer convoy_guess"},
        {"Authorization": "Bearer "},
        {"Authorization": headers["admin"]["Authorization"].replace("Bearer", "Basic")},
    ):
        answer = client.open(path, method=method, headers=sent, json={"version": 2})
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.content_type == "application/problem+json"
    if method == "POST":
        answer = client.post(path, headers=headers["viewer"], json={"version": 2})
        assert (answer.status_code, answer.get_json()["title"]) == (403, "token insufficient")
    assert len(store.audit_logs.read("digits").lines) == before


def test_every_route_except_the_public_ones_needs_a_token(client: FlaskClient) -> None:
    asked = 0
    for rule in client.application.url_map.iter_rules():
        path = re.sub(r"<int:version>", "2", rule.rule)
        path = path.replace("<name>", "digits").replace("<file>", "roc.png")
        for method in (rule.methods or set()) if rule.endpoint not in PUBLIC else ():
            answer = client.open(path, method=method)
            to_login = answer.status_code == 303 and "login" in answer.headers["Location"]
            assert answer.status_code == 401 or to_login, (path, method)
            asked += 1
    assert asked > 40


def test_the_openapi_description_has_exactly_the_routes() -> None:
    described = {
        (method.upper(), path)
        for path, methods in document()["paths"].items()
        for method in methods
    }
    served = {
        (method, re.sub(r"<(?:int:)?(\w+)>", r"{\1}", rule)) for rule, method, _ in api.ROUTES
    }
    assert described == served


def test_a_viewer_reads_models_versions_history_and_audit(
    client: FlaskClient, headers: dict[str, dict[str, str]], promoted: None
) -> None:
    viewer = headers["viewer"]
    aliases = {"champion": 1, "challenger": 2}
    standing = {"name": "digits", "aliases": aliases, "canary": None}
    assert client.get("/v1/models", headers=viewer).json == {"models": [standing]}
    assert client.get("/v1/models/digits", headers=viewer).json == standing
    versions = client.get("/v1/models/digits/versions", headers=viewer).get_json()["versions"]
    assert [each["version"] for each in versions] == [2, 1]
    one = client.get("/v1/models/digits/versions/1", headers=viewer).get_json()
    assert one["manifest"]["labels"] == list("0123456789")
    lines = client.get("/v1/models/digits/history", headers=viewer).get_json()["lines"]
    assert [line["entry"]["action"] for line in lines] == ["promoted"]
    day = lines[0]["entry"]["at"][:10]
    at = client.get(f"/v1/models/digits/history?at={day}", headers=viewer).get_json()["lines"]
    assert [line["entry"]["to_version"] for line in at] == [1]
    assert client.get("/v1/models/digits/history?at=Tuesday", headers=viewer).status_code == 400
    assert client.get("/v1/models/digits/audit", headers=viewer).json == {"lines": 1, "faults": []}


@pytest.mark.parametrize(
    "path",
    ["/absent", "/absent/history", "/absent/audit", "/digits/versions/9", "/absent/versions"],
)
def test_a_model_or_version_that_does_not_exist_is_404(
    client: FlaskClient, headers: dict[str, dict[str, str]], promoted: None, path: str
) -> None:
    assert client.get(f"/v1/models{path}", headers=headers["viewer"]).status_code == 404


def test_the_gate_runs_in_the_background(
    client: FlaskClient, headers: dict[str, dict[str, str]], promoted: None
) -> None:
    path = "/v1/models/digits/versions/2/gate-result"
    first = client.get(path, headers=headers["viewer"])
    assert (first.status_code, first.headers["Retry-After"]) == (202, "2")
    wait_for_gates()
    found = client.get(path, headers=headers["viewer"])
    assert found.status_code == 200
    assert (found.get_json()["accepted"], found.get_json()["challenger"]) == (True, 2)


def test_an_operator_runs_a_canary_promotes_and_rolls_back(
    client: FlaskClient, headers: dict[str, dict[str, str]], promoted: None, store: ModelStore
) -> None:
    def post(verb: str, **body: Any) -> Any:
        return client.post(f"/v1/models/digits/{verb}", headers=headers["admin"], json=body)

    assert post("canary/start", challenger=2, share=0.1, reason="to see").status_code == 200
    assert store.aliases.read_with_canary("digits")[1] == Canary(version=2, share=0.1)
    assert (
        post("canary/stop", expect_challenger=2).get_json()["entry"]["action"] == "canary stopped"
    )
    assert post("promote", version=2, expect_champion=7).status_code == 409
    moved = post("promote", version=2, expect_champion=1, reason="better")
    assert moved.get_json()["entry"]["by"] == "admin"
    refused = post("promote", version=1)
    assert (refused.status_code, refused.get_json()["title"]) == (422, "promotion refused")
    assert post("promote", version=1, force=True).status_code == 400  # without a reason
    assert post("promote", version=1, force=True, reason="test").status_code == 200
    assert post("roll-back").get_json()["entry"]["to_version"] == 2
    assert [line.entry.action for line in store.audit_logs.read("digits").lines] == [
        *(
            "promoted",
            "canary started",
            "canary stopped",
            "promoted",
            "refused",
            "forced",
            "rolled back",
        )
    ]


def test_a_version_with_new_classes_is_promoted_only_if_the_operator_allows_it(
    client: FlaskClient,
    headers: dict[str, dict[str, str]],
    promoted: None,
    publish: Publish,
    better_and_worse_seed: tuple[int, int],
) -> None:
    better, _ = better_and_worse_seed
    publish(seed=better, change=lambda each: replace(each, labels=tuple("abcdefghij")))

    def promote(**body: Any) -> Any:
        path = "/v1/models/digits/promote"
        return client.post(path, headers=headers["admin"], json={"version": 3, **body})

    refused = promote()
    assert refused.status_code == 422
    assert "labels that are renamed: '0' → 'a'" in refused.get_json()["detail"]
    comparison = client.get(
        "/v1/models/digits/versions/3/gate-result", headers=headers["viewer"]
    ).get_json()
    assert comparison["accepted"] is False
    assert comparison["comparison"]["class_changes"][0].startswith("labels that are renamed")
    assert promote(allow_new_classes=True).get_json()["entry"]["action"] == "promoted"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 400),
        (b"[" * 5000, 400),
        (b'{"version": "2"}', 400),
        (b'{"version": 2, "who": "me"}', 400),
        (b'{"version": 2, "reason": "' + b"x" * 70_000 + b'"}', 413),
        (b'{"version": 2, "reason": "' + b"x" * 20_000 + b'"}', 400),
    ],
)
def test_an_invalid_body_decides_nothing(
    client: FlaskClient,
    headers: dict[str, dict[str, str]],
    promoted: None,
    store: ModelStore,
    data: bytes,
    status: int,
) -> None:
    path = "/v1/models/digits/promote"
    assert client.post(path, headers=headers["admin"], data=data).status_code == status
    assert len(store.audit_logs.read("digits").lines) == 1


def test_live_figures_come_from_the_services(
    client: FlaskClient,
    headers: dict[str, dict[str, str]],
    publish: Publish,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert client.get("/v1/models/digits/traffic", headers=headers["viewer"]).status_code == 404
    publish()
    status = ServingStatus(
        model="digits", generation=1, champion=1, versions=(VersionTraffic(version=1, requests=7),)
    )
    monkeypatch.setattr(state, "read_serving_status", lambda services, name: status)
    answer = client.get("/v1/models/digits/traffic", headers=headers["viewer"])
    assert msgspec.json.decode(answer.data, type=ServingStatus) == status

    def silent(services: Any, name: Any) -> None:
        raise ModelNotReady("no service answers")

    monkeypatch.setattr(state, "read_serving_status", silent)
    assert client.get("/v1/models/digits/traffic", headers=headers["viewer"]).status_code == 503


def test_errors_are_problem_json_without_internal_details(
    client: FlaskClient,
    headers: dict[str, dict[str, str]],
    store: ModelStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert client.get("/nowhere").status_code == 404
    assert client.put("/v1/models").status_code == 405

    def fail(error: Exception) -> Any:
        def models() -> None:
            raise error

        monkeypatch.setattr(store, "models", models)
        return client.get("/v1/models", headers=headers["viewer"])

    assert fail(RegistryUnavailable("down")).status_code == 503
    answer = fail(RuntimeError("secret"))
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert any(record.levelname == "ERROR" for record in caplog.records)
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_a_damaged_file_of_tokens_is_answered_with_503(
    client: FlaskClient, headers: dict[str, dict[str, str]], registry_paths: Paths
) -> None:
    registry_paths.tokens.write_text("[{")
    answer = client.get("/v1/models", headers=headers["viewer"])
    assert (answer.status_code, answer.get_json()["detail"]) == (
        503,
        "tokens cannot be checked now; try again later",
    )


def test_a_gate_result_without_a_comparison_is_shown_and_computed_once(
    client: FlaskClient,
    headers: dict[str, dict[str, str]],
    promoted: None,
    publish: Publish,
    few_digits: Dataset,
    downloads: list[int],
) -> None:
    publish(seed=9, data=replace(few_digits, validation=few_digits.test))
    path = "/v1/models/digits/versions/3/gate-result"
    assert client.get(path, headers=headers["viewer"]).status_code == 202
    wait_for_gates()
    for _ in range(3):
        found = client.get(path, headers=headers["viewer"])
        assert (found.status_code, found.get_json()["accepted"]) == (200, False)
        assert "cannot be compared" in found.get_json()["summary"]
    assert sorted(downloads) == [1, 3]


def test_a_changed_policy_makes_the_gate_run_again(
    client: FlaskClient,
    headers: dict[str, dict[str, str]],
    app: Flask,
    promoted: None,
    store: ModelStore,
    registry_paths: Paths,
) -> None:
    control = app.extensions["convoy"]
    control._run_gate(*store.champion_and_candidate("digits", 2))
    path = "/v1/models/digits/versions/2/gate-result"
    assert client.get(path, headers=headers["viewer"]).get_json()["accepted"] is True
    registry_paths.policy("digits").parent.mkdir()
    registry_paths.policy("digits").write_text("max_log_loss_ratio = 0.0001")
    assert client.get(path, headers=headers["viewer"]).status_code == 202
    control._run_gate(*store.champion_and_candidate("digits", 2))
    assert client.get(path, headers=headers["viewer"]).get_json()["accepted"] is False
