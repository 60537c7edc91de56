"""The service's own state: models, probes, metrics, the API's description, the page."""

import re
import time
from collections.abc import Callable
from urllib.parse import urljoin

import pytest
from flask import Flask
from flask.testing import FlaskClient
from msgspec.structs import replace

from registry.delivery import deployment
from registry.delivery.deployment import write_status
from registry.model.bundle import Bundle
from service import create_app
from service.loading.model_slot import ModelSlot
from service.observability.metrics import Metrics
from service.server.protocol import IN_LOOP, Postpone
from service.settings import Settings
from tests.service.conftest import REF


def test_models_are_listed_before_and_after_loading(
    client: FlaskClient, slot: ModelSlot, deploy: Callable[..., Bundle]
) -> None:
    (before,) = client.get("/v1/models").get_json()["models"]
    assert (before["ready"], before["version"], before["device"]) == (False, None, None)
    deploy(1)
    slot.refresh()
    (after,) = client.get("/v1/models").get_json()["models"]
    assert (after["ready"], after["version"], after["device"]) == (True, 1, "cpu")
    assert after["wanted"] == "models:/digits@champion"


@pytest.mark.parametrize("path", ["", "/versions/1", "/aliases/champion"])
def test_the_description_of_a_model_is_complete(ready: FlaskClient, path: str) -> None:
    response = ready.get(f"/v1/models/digits{path}")
    body = response.get_json()
    assert body["labels"] == list("0123456789")
    assert body["preprocess"]["width_px"] == 8
    assert body["network"]["name"] == "dense"
    assert 0 <= body["metrics"]["validation_accuracy"] <= 1
    assert body["source"]["seed"] == 0
    assert len(body["manifest_sha256"]) == 64
    assert response.headers["X-Model-Version"] == "1"


def test_an_unknown_model_is_404_and_a_model_that_is_not_loaded_503(client: FlaskClient) -> None:
    assert client.get("/v1/models/unknown").status_code == 404
    assert client.get("/v1/models/digits").status_code == 503


@pytest.mark.parametrize("path", ["/unknown", "/digits/versions/9", "/digits/aliases/previous"])
def test_models_and_versions_that_are_not_served_are_404(ready: FlaskClient, path: str) -> None:
    assert ready.get(f"/v1/models{path}").status_code == 404


def test_readiness_depends_on_loading_and_liveness_does_not(
    client: FlaskClient, slot: ModelSlot, deploy: Callable[..., Bundle]
) -> None:
    assert client.get("/livez").status_code == 200
    for path in ("/readyz", "/healthz"):
        response = client.get(path)
        assert (response.status_code, response.get_json()["ready"]) == (503, False)
    deploy(1)
    slot.refresh()
    for path in ("/readyz", "/healthz"):
        response = client.get(path)
        assert (response.status_code, response.get_json()["ready"]) == (200, True)


def test_the_loop_answers_probes_itself_and_no_other_route(
    slot: ModelSlot, settings: Settings, metrics: Metrics
) -> None:
    app = create_app(replace(settings, health_route="/own-health"), {"digits": slot}, metrics)
    in_loop = {"environ_overrides": {IN_LOOP: 0}}
    probes = ("/livez", "/readyz", "/healthz", "/ping", "/health", "/own-health")
    for path in (*probes, "/v2/health/live", "/v2/health/ready"):
        assert app.test_client().get(path, **in_loop).status_code in (200, 503), path
    for path in ("/metrics", "/v1/models", "/v2", "/docs", "/nowhere"):
        with pytest.raises(Postpone):
            app.test_client().get(path, **in_loop)


def test_readiness_says_how_stale_the_registry_is(ready: FlaskClient, slot: ModelSlot) -> None:
    assert ready.get("/readyz").get_json()["models"][0]["registry_age_s"] is None
    write_status(slot._models_folder, REF, None)
    write_status(slot._models_folder, REF, "the registry is down")
    (model,) = ready.get("/readyz").get_json()["models"]
    assert 0 <= model["registry_age_s"] < 60
    assert model["registry_error"] == "the registry is down"
    assert "convoy_last_sync_timestamp_seconds{" in ready.get("/metrics").text


def test_metrics_count_what_happened(ready: FlaskClient, png: bytes) -> None:
    for body in (png, png, b"no image"):
        ready.post("/v1/classify", data=body, content_type="image/png")
    text = ready.get("/metrics").text
    labels = 'model_name="digits",model_version="1"'
    assert f'convoy_requests_total{{{labels},outcome="ok",protocol="v1"}} 2.0' in text
    assert f'convoy_requests_total{{{labels},outcome="client_error",protocol="v1"}} 1.0' in text
    assert f"convoy_images_total{{{labels}}} 2.0" in text
    assert f"convoy_request_seconds_count{{{labels}}} 2.0" in text
    for stage in ("decode", "queue", "forward"):
        assert f'convoy_stage_seconds_count{{{labels},stage="{stage}"}} 2.0' in text


def test_counters_that_alarms_use_exist_before_the_first_event(ready: FlaskClient) -> None:
    """Prometheus sees no increase if the first value is 1: no alarm for the first failure."""
    text = ready.get("/metrics").text
    for version in ("", "1"):
        labels = f'model_name="digits",model_version="{version}"'
        for outcome in ("server_error", "overload"):
            assert (
                f'convoy_requests_total{{{labels},outcome="{outcome}",protocol="v2"}} 0.0' in text
            )
    assert 'convoy_version_switches_total{model_name="digits",outcome="failed"} 0.0' in text


def test_clients_cannot_add_time_series(ready: FlaskClient, png: bytes) -> None:
    def series() -> int:
        return len(ready.get("/metrics").text.splitlines())

    ready.post("/v1/models/x/classify", data=png)
    before = series()
    for number in range(20):
        ready.post(f"/v1/models/made-up-{number}/classify", data=png)
        ready.post(f"/v1/models/digits/versions/{number + 5}/classify", data=png)
    assert series() <= before + 2


def test_the_openapi_document_has_every_route_and_no_other(app: Flask, client: FlaskClient) -> None:
    described = {
        (method.upper(), path)
        for path, methods in client.get("/openapi.json").get_json()["paths"].items()
        for method in methods
    }
    refused = "/v2/<path:rest>"
    pages = {"/", "/docs", "/openapi.json", "/static/<path:filename>", refused}
    routes = {
        (method, re.sub(r"<(?:int:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) & {"GET", "POST"}
        if rule.rule not in pages
    }
    named = (
        "/v1/models/{name}",
        "/v1/models/{name}/versions/{version}",
        "/v1/models/{name}/aliases/{alias}",
    )
    before_flask = {
        *(("POST", f"{prefix}/classify") for prefix in ("/v1", *named)),
        *(("POST", f"{prefix}/invocations") for prefix in ("", "/endpoints/{name}", *named)),
    }
    for path in ("/predictions/{name}", "/predictions/{name}/{version}"):
        before_flask |= {("POST", path), ("PUT", path)}
    for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        before_flask |= {("POST", path)}
    assert described == routes | before_flask


def test_every_reference_of_the_openapi_document_resolves(client: FlaskClient) -> None:
    text = client.get("/openapi.json").text
    described = client.get("/openapi.json").get_json()
    references = set(re.findall(r'"\$ref":"#/components/schemas/(\w+)"', text))
    assert references
    assert references <= set(described["components"]["schemas"])


def test_the_docs_show_every_path(client: FlaskClient) -> None:
    page = client.get("/docs")
    assert page.content_type.startswith("text/html")
    paths = client.get("/openapi.json").get_json()["paths"]
    assert all(path in page.text for path in paths)
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_the_page_loads_only_its_own_files(client: FlaskClient) -> None:
    with client.get("/") as page:
        assert "script-src 'self'" in page.headers["Content-Security-Policy"]
        text = page.get_data(as_text=True)
    assert "<style" not in text
    files = re.findall(r'(?:src|href)="(static/[^"]+)"', text)
    assert len(files) == 2
    for file in files:
        with client.get(f"/{file}") as answer:
            assert answer.status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_the_addresses_in_pages_stay_below_the_path_of_a_proxy(
    client: FlaskClient, path: str
) -> None:
    """The proxy serves the pages at https://host/convoy/…, and sends requests without /convoy."""
    with client.get(path) as page:
        addresses = re.findall(r"""(?:src|href)=["']?([^"'> ]+)""", page.get_data(as_text=True))
    fetched = [each for each in addresses if not each.startswith("data:")]
    assert len(fetched) >= 2
    for address in fetched:
        below = urljoin(f"https://host/convoy{path}", address)
        assert below.startswith("https://host/convoy/")
        with client.get(below.removeprefix("https://host/convoy")) as answer:
            assert answer.status_code in (200, 503)
    with client.get("/static/page.js") as script:
        text = script.get_data(as_text=True)
    assert re.findall(r'ask\("([^"]+)"', text) == ["v1/models", "v1/classify"]


def test_a_slash_at_the_end_is_the_same_route(ready: FlaskClient, png: bytes) -> None:
    for path in ("/v1/models/", "/v1/models/digits/", "/livez/", "/readyz/"):
        assert ready.get(path).status_code == 200
    for path in ("/v1/classify/", "/v1/models/digits/versions/1/classify/"):
        assert ready.post(path, data=png).status_code == 200
    assert ready.get("/docs/").headers["Location"] == "../docs"  # its addresses are relative


def test_registry_age_counts_from_the_last_agreement(
    ready: FlaskClient, slot: ModelSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_status(slot._models_folder, REF, None)
    now = deployment.boot_s()
    monkeypatch.setattr(deployment, "boot_s", lambda: now + 100)
    (model,) = ready.get("/readyz").get_json()["models"]
    assert 99 <= model["registry_age_s"] <= 101
    assert model["stale"]


@pytest.mark.parametrize("jump_s", [-1e9, -3600, 3600, 1e9])
def test_a_clock_that_is_set_does_not_make_the_registry_stale(
    ready: FlaskClient, slot: ModelSlot, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    write_status(slot._models_folder, REF, None)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + jump_s)
    (model,) = ready.get("/readyz").get_json()["models"]
    assert model["registry_age_s"] < 60
    assert not model["stale"]
