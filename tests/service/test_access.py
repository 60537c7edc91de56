"""Tokens and rate limits: access control itself, and through the app."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from msgspec.structs import replace

from registry.auth.tokens import Tokens
from registry.core.errors import RateExceeded, TokenMissing, UsageError
from registry.model.bundle import Bundle
from service import create_app
from service.access.auth import PUBLIC, AccessControl
from service.loading.model_slot import ModelSlot
from service.observability.metrics import Metrics
from service.settings import Settings

OPEN = ("/docs", "/livez", "/readyz", "/healthz", "/openapi.json")
VIEWS = ("/v1/models", "/v1/models/digits", "/v1/models/digits/traffic", "/metrics")


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    tokens = Tokens(tmp_path / "tokens.json")
    return {role: tokens.add(role, role) for role in ("classify", "viewer", "admin")} | {
        "wrong": "convoy_wrong",
        "service": "the service key",
    }


@pytest.fixture
def client(
    slot: ModelSlot,
    settings: Settings,
    metrics: Metrics,
    deploy: Callable[..., Bundle],
    texts: dict[str, str],
    tmp_path: Path,
) -> FlaskClient:
    """A client of an app that requires tokens."""
    deploy(1)
    assert slot.refresh()
    secured = replace(
        settings,
        auth="required",
        tokens=tmp_path / "tokens.json",
        service_key=texts["service"],
    )
    return create_app(secured, {"digits": slot}, metrics).test_client()


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


@pytest.mark.parametrize("path", OPEN)
def test_probes_and_pages_need_no_token(client: FlaskClient, path: str) -> None:
    assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("role", "classifies", "views"),
    [
        ("classify", 200, 403),
        ("viewer", 403, 200),
        ("admin", 200, 200),
        ("wrong", 401, 401),
        ("service", 401, 200),
        (None, 401, 401),
    ],
)
def test_each_role_may_do_only_what_it_permits(
    client: FlaskClient,
    texts: dict[str, str],
    png: bytes,
    role: str | None,
    classifies: int,
    views: int,
) -> None:
    headers = bearer(texts[role]) if role else {}
    answer = client.post("/v1/classify", data=png, headers=headers)
    assert answer.status_code == classifies
    for path in VIEWS:
        assert client.get(path, headers=headers).status_code == views
    if classifies == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.get_json()["type"] == "urn:convoy:problem:token-missing"


@pytest.mark.parametrize("sent", ["convoy_x", "Basic convoy_x", "Bearer", "Bearer  ", "Bearer ä"])
def test_a_malformed_or_unknown_token_is_401(client: FlaskClient, png: bytes, sent: str) -> None:
    answer = client.post("/v1/classify", data=png, headers={"Authorization": sent})
    assert answer.status_code == 401


def test_tokens_are_rotated_without_a_restart(
    client: FlaskClient, texts: dict[str, str], png: bytes, tmp_path: Path
) -> None:
    tokens = Tokens(tmp_path / "tokens.json")
    fresh = tokens.add("fresh", "classify")
    tokens.remove("classify")
    statuses = [
        client.post("/v1/classify", data=png, headers=bearer(text)).status_code
        for text in (fresh, texts["classify"])
    ]
    assert statuses == [200, 401]


def test_no_caller_is_admitted_if_the_tokens_file_cannot_be_read(
    client: FlaskClient, texts: dict[str, str], png: bytes, tmp_path: Path
) -> None:
    (tmp_path / "tokens.json").write_text("[{")
    answer = client.post("/v1/classify", data=png, headers=bearer(texts["admin"]))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert client.get("/v1/models", headers=bearer(texts["admin"])).status_code == 503


def test_a_client_over_its_rate_limit_is_429_and_learns_when_to_retry(
    slot: ModelSlot, settings: Settings, deploy: Callable[..., Bundle], png: bytes
) -> None:
    deploy(1)
    assert slot.refresh()
    limited = replace(settings, rate_limit=0.5, burst=3)
    client = create_app(limited, {"digits": slot}, Metrics()).test_client()
    answers = [client.post("/v1/classify", data=png) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[3].headers["Retry-After"] == "2"
    assert json.loads(answers[3].data)["title"] == "rate exceeded"
    assert client.get("/v1/models").status_code == 200


def test_a_postponed_request_counts_once_against_the_rate_limit(tmp_path: Path) -> None:
    access_control = AccessControl(Settings(rate_limit=0.1, burst=1))
    access_control.admit({"REMOTE_ADDR": "192.0.2.1"})
    access_control.admit({"REMOTE_ADDR": "192.0.2.1"}, again=True)
    with pytest.raises(RateExceeded):
        access_control.admit({"REMOTE_ADDR": "192.0.2.1"})


def test_every_route_except_the_public_ones_needs_a_token(client: FlaskClient) -> None:
    of_flask = {
        (re.sub(r"<(?:int:)?version>", "1", rule.rule).replace("<name>", "digits"), method)
        for rule in client.application.url_map.iter_rules()
        for method in rule.methods or ()
        if rule.endpoint not in PUBLIC
    }
    of_protocols = {
        (re.sub(r"{version}", "1", path).replace("{name}", "digits"), method.upper())
        for path, methods in client.get("/openapi.json").get_json()["paths"].items()
        for method, operation in methods.items()
        if "requestBody" in operation
    }
    assert ("/metrics", "GET") in of_flask
    assert ("/predictions/digits", "PUT") in of_protocols
    for path, method in of_flask | of_protocols:
        path = path.replace("<alias>", "champion").replace("{alias}", "champion")
        assert client.open(path, method=method).status_code == 401, (path, method)


def test_an_empty_service_key_admits_no_caller() -> None:
    access_control = AccessControl(
        Settings.from_environment({"CONVOY_AUTH": "required", "CONVOY_SERVICE_KEY": ""})
    )
    with pytest.raises(TokenMissing):
        access_control.admit_to_route("health.metrics", {})


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "caller"),
    [
        ("10.0.0.9", "203.0.113.7", "203.0.113.7"),
        ("10.0.0.9", "198.51.100.1, 203.0.113.7", "203.0.113.7"),  # the proxy added the last
        ("10.0.0.9", "", "10.0.0.9"),
        ("192.0.2.1", "203.0.113.7", "192.0.2.1"),  # the peer is not a proxy
        ("", "203.0.113.7", ""),
        ("::ffff:10.0.0.9", "203.0.113.7", "203.0.113.7"),  # as a dual-stack socket reports it
        ("10.0.0.9", "203.0.113.7:51000", "203.0.113.7"),
        ("fd00::1", "[2001:db8::5]:80", "2001:db8::5"),
        ("10.0.0.9", "x" * 50, "10.0.0.9"),
    ],
)
def test_a_trusted_proxy_names_the_client_of_a_request(
    peer: str, forwarded_for: str, caller: str
) -> None:
    access_control = AccessControl(Settings(trusted_proxies="10.0.0.0/8, fd00::/8"))
    environ = {"REMOTE_ADDR": peer, "HTTP_X_FORWARDED_FOR": forwarded_for}
    assert access_control._address(environ) == caller


def test_a_malformed_network_of_proxies_stops_the_start() -> None:
    with pytest.raises(UsageError, match=r"CONVOY_TRUSTED_PROXIES='10.0.0.0/99'"):
        Settings.from_environment({"CONVOY_TRUSTED_PROXIES": "10.0.0.0/99"})
