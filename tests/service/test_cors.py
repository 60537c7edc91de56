"""Pages of other origins: who may ask, and that by default none may."""

from collections.abc import Callable

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
    """A client of a service that lets pages of two origins ask."""
    deploy(1)
    assert slot.refresh()
    settings = Settings(cors_origins=f"{ORIGIN}, http://localhost:3000")
    return create_app(settings, {"digits": slot}, Metrics()).test_client()


def marks(headers) -> set[str]:
    return {name for name, _ in headers if name.startswith("Access-Control-")}


def test_by_default_no_other_origin_may_ask(ready: FlaskClient, png: bytes) -> None:
    assert not marks(ready.options("/v1/classify", headers=PREFLIGHT).headers)
    assert not marks(ready.post("/v1/classify", data=png, headers={"Origin": ORIGIN}).headers)


def test_an_origin_that_is_listed_may_ask(open_client: FlaskClient, png: bytes) -> None:
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
def test_another_origin_may_not(open_client: FlaskClient, png: bytes, origin: str) -> None:
    headers = PREFLIGHT | {"Origin": origin}
    assert not marks(open_client.options("/v1/classify", headers=headers).headers)
    answer = open_client.post("/v1/classify", data=png, headers={"Origin": origin})
    assert not marks(answer.headers)
    assert answer.headers["Vary"] == "Origin"


@pytest.mark.parametrize("text", ["*", "app.example.com", "https://a.example/path", "null"])
def test_what_is_not_an_origin_is_named(text: str) -> None:
    with pytest.raises(UsageError, match=r"CONVOY_CORS_ORIGINS.*is not an origin"):
        Settings.from_environment({"CONVOY_CORS_ORIGINS": f"{ORIGIN},{text}"})
