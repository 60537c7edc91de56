"""Keys and rates, at the door itself and through the app."""

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
LOOK = ("/v1/models", "/v1/models/digits", "/v1/models/digits/traffic", "/metrics")


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    tokens = Tokens(tmp_path / "tokens.json")
    return {role: tokens.add(role, role) for role in ("classify", "viewer", "admin")} | {
        "wrong": "convoy_wrong",
        "service": "between ourselves",
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
    """A client of an app that asks for keys."""
    deploy(1)
    assert slot.refresh()
    asking = replace(
        settings,
        keys="required",
        tokens=tmp_path / "tokens.json",
        service_key=texts["service"],
    )
    return create_app(asking, {"digits": slot}, metrics).test_client()


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


@pytest.mark.parametrize("path", OPEN)
def test_probes_and_pages_ask_for_no_key(client: FlaskClient, path: str) -> None:
    assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("role", "classifies", "perceptual_hashes"),
    [
        ("classify", 200, 403),
        ("viewer", 403, 200),
        ("admin", 200, 200),
        ("wrong", 401, 401),
        ("service", 401, 200),
        (None, 401, 401),
    ],
)
def test_each_key_opens_what_it_is_for(
    client: FlaskClient,
    texts: dict[str, str],
    png: bytes,
    role: str | None,
    classifies: int,
    perceptual_hashes: int,
) -> None:
    headers = bearer(texts[role]) if role else {}
    answer = client.post("/v1/classify", data=png, headers=headers)
    assert answer.status_code == classifies
    for path in LOOK:
        assert client.get(path, headers=headers).status_code == perceptual_hashes
    if classifies == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.json["type"] == "urn:convoy:problem:key-missing"


@pytest.mark.parametrize("sent", ["convoy_x", "Basic convoy_x", "Bearer", "Bearer  ", "Bearer ä"])
def test_what_is_no_key_opens_nothing(client: FlaskClient, png: bytes, sent: str) -> None:
    answer = client.post("/v1/classify", data=png, headers={"Authorization": sent})
    assert answer.status_code == 401


def test_keys_are_rotated_without_a_restart(
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


def test_a_file_of_keys_that_cannot_be_read_lets_nobody_in(
    client: FlaskClient, texts: dict[str, str], png: bytes, tmp_path: Path
) -> None:
    (tmp_path / "tokens.json").write_text("[{")
    answer = client.post("/v1/classify", data=png, headers=bearer(texts["admin"]))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert client.get("/v1/models", headers=bearer(texts["admin"])).status_code == 503


def test_who_asks_too_often_is_told_when_to_come_back(
    slot: ModelSlot, settings: Settings, deploy: Callable[..., Bundle], png: bytes
) -> None:
    deploy(1)
    assert slot.refresh()
    limited = replace(settings, rate=0.5, burst=3)
    client = create_app(limited, {"digits": slot}, Metrics()).test_client()
    answers = [client.post("/v1/classify", data=png) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[3].headers["Retry-After"] == "2"
    assert json.loads(answers[3].data)["title"] == "rate exceeded"
    assert client.get("/v1/models").status_code == 200


def test_a_request_that_a_thread_takes_over_is_counted_once(tmp_path: Path) -> None:
    access_control = AccessControl(Settings(rate=0.1, burst=1))
    access_control.admit({"REMOTE_ADDR": "192.0.2.1"})
    access_control.admit({"REMOTE_ADDR": "192.0.2.1"}, again=True)
    with pytest.raises(RateExceeded):
        access_control.admit({"REMOTE_ADDR": "192.0.2.1"})


def test_every_route_but_the_public_ones_asks_for_a_token(client: FlaskClient) -> None:
    of_flask = {
        (re.sub(r"<(?:int:)?version>", "1", rule.rule).replace("<name>", "digits"), method)
        for rule in client.application.url_map.iter_rules()
        for method in rule.methods or ()
        if rule.endpoint not in PUBLIC
    }
    of_protocols = {
        (re.sub(r"{version}", "1", path).replace("{name}", "digits"), method.upper())
        for path, methods in client.get("/openapi.json").json["paths"].items()
        for method, operation in methods.items()
        if "requestBody" in operation
    }
    assert ("/metrics", "GET") in of_flask
    assert ("/predictions/digits", "PUT") in of_protocols
    for path, method in of_flask | of_protocols:
        path = path.replace("<alias>", "champion").replace("{alias}", "champion")
        assert client.open(path, method=method).status_code == 401, (path, method)


def test_an_empty_service_key_opens_nothing() -> None:
    access_control = AccessControl(
        Settings.from_environment({"CONVOY_AUTH": "required", "CONVOY_SERVICE_KEY": ""})
    )
    with pytest.raises(TokenMissing):
        access_control.admit_to_route("health.metrics", {})


@pytest.mark.parametrize(
    ("peer", "told", "caller"),
    [
        ("10.0.0.9", "203.0.113.7", "203.0.113.7"),
        ("10.0.0.9", "198.51.100.1, 203.0.113.7", "203.0.113.7"),  # the last is our proxy's word
        ("10.0.0.9", "", "10.0.0.9"),
        ("192.0.2.1", "203.0.113.7", "192.0.2.1"),  # who is no proxy may say what it likes
        ("", "203.0.113.7", ""),
        ("::ffff:10.0.0.9", "203.0.113.7", "203.0.113.7"),  # as a socket for both families sees it
        ("10.0.0.9", "203.0.113.7:51000", "203.0.113.7"),
        ("fd00::1", "[2001:db8::5]:80", "2001:db8::5"),
        ("10.0.0.9", "x" * 50, "10.0.0.9"),
    ],
)
def test_a_proxy_of_ours_says_whose_a_request_is(peer: str, told: str, caller: str) -> None:
    access_control = AccessControl(Settings(trusted_proxies="10.0.0.0/8, fd00::/8"))
    environ = {"REMOTE_ADDR": peer, "HTTP_X_FORWARDED_FOR": told}
    assert access_control._address(environ) == caller


def test_networks_that_are_none_stop_the_start() -> None:
    with pytest.raises(UsageError, match=r"CONVOY_TRUSTED_PROXIES='10.0.0.0/99'"):
        Settings.from_environment({"CONVOY_TRUSTED_PROXIES": "10.0.0.0/99"})
