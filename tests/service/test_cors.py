"""Pages of which other origins may send requests; by default, none may."""

from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient

from registry.core.errors import UsageError
from registry.model.bundle import Bundle
from service import create_app
from service.loading.model_slot import ModelSlot
from service.observability.metrics import Metrics
from service.settings import Settings

ORIGIN = "https://app.example.com"
PREFLIGHT = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}


@pytest.fixture
def open_client(slot: ModelSlot, deploy: Callable[..., Bundle]) -> FlaskClient:
    """A client of a service that allows pages of two origins."""
    deploy(1)
    assert slot.refresh()
    settings = Settings(cors_origins=f"{ORIGIN}, http://localhost:3000")
    return create_app(settings, {"digits": slot}, Metrics()).test_client()


def cors_headers(headers: Any) -> set[str]:
    return {name for name, _ in headers if name.startswith("Access-Control-")}


def test_by_default_no_other_origin_is_allowed(ready: FlaskClient, png: bytes) -> None:
    assert not cors_headers(ready.options("/v1/classify", headers=PREFLIGHT).headers)
    assert not cors_headers(
        ready.post("/v1/classify", data=png, headers={"Origin": ORIGIN}).headers
    )


def test_a_listed_origin_is_allowed(open_client: FlaskClient, png: bytes) -> None:
    answer = open_client.options("/v1/classify", headers=PREFLIGHT)
    assert answer.status_code == 204
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]
    for answer in (
        open_client.post("/v1/classify", data=png, headers={"Origin": ORIGIN}),
        open_client.post("/v1/classify", data=b"no image", headers={"Origin": ORIGIN}),
        open_client.get("/v1/models", headers={"Origin": ORIGIN}),
    ):
        assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "X-Model-Version" in answer.headers["Access-Control-Expose-Headers"]
        assert answer.headers["Vary"] == "Origin"
        assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "https://app.example.com.evil"])
def test_an_origin_that_is_not_listed_is_not_allowed(
    open_client: FlaskClient, png: bytes, origin: str
) -> None:
    headers = PREFLIGHT | {"Origin": origin}
    assert not cors_headers(open_client.options("/v1/classify", headers=headers).headers)
    answer = open_client.post("/v1/classify", data=png, headers={"Origin": origin})
    assert not cors_headers(answer.headers)
    assert answer.headers["Vary"] == "Origin"


@pytest.mark.parametrize("text", ["*", "app.example.com", "https://a.example/path", "null"])
def test_a_setting_that_is_not_an_origin_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"CONVOY_CORS_ORIGINS.*is not an origin"):
        Settings.from_environment({"CONVOY_CORS_ORIGINS": f"{ORIGIN},{text}"})
