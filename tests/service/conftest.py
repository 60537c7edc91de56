"""An app around tiny real models, loaded in the test's own thread."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.serving import make_server

from registry.delivery.deployment import DeployedVersion, version_folder, write_deployment
from registry.delivery.signing import TrustedKeys
from registry.model.bundle import Bundle
from registry.model.plans.planner import Planner
from registry.model.plans.torch_eager import EAGER
from registry.model.refs import Canary, ModelRef
from service import create_app
from service.inference.loaded_model import ServedModel
from service.loading import version_loader
from service.loading.model_slot import ModelSlot
from service.loading.open_slots import load_served
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.conftest import MakeBundle

REF = ModelRef("digits", alias="champion")


class Head:
    """The ``start_response`` of a WSGI server, which keeps the statuses."""

    def __init__(self) -> None:
        self.statuses: list[str] = []

    def __call__(
        self, status: str, headers: object, exc_info: object = None
    ) -> Callable[[bytes], object]:
        self.statuses.append(status)
        return lambda data: None


def load(bundle: Bundle, deployed: DeployedVersion, metrics: Metrics | None = None) -> ServedModel:
    planner = Planner(Path("unused"), "cpu", None, EAGER)
    settings = Settings(max_batch=8, queue_limit=64)
    return load_served(
        bundle,
        deployed,
        name=bundle.manifest.model,
        planner=planner,
        settings=settings,
        metrics=metrics or Metrics(),
        trust=TrustedKeys({}),
    )


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def deploy(make_bundle: MakeBundle, models: Path) -> Callable[..., Bundle]:
    """Writes a version to disk and deploys it, as the puller does."""

    def lay_out(version: int, seed: int = 0, alias: str | None = "champion") -> Bundle:
        bundle = make_bundle(seed=seed, folder=version_folder(models, "digits", version))
        ref = ModelRef("digits", version if alias is None else None, alias)
        write_deployment(models, ref, (deployed(bundle, version, alias),))
        return bundle

    return lay_out


@pytest.fixture
def deploy_canary(make_bundle: MakeBundle, models: Path) -> Callable[..., tuple[Bundle, Bundle]]:
    """Deploys version 1 with version 2 as its canary or shadow; returns both bundles."""

    def lay_out(**canary: float) -> tuple[Bundle, Bundle]:
        old, new = (
            make_bundle(seed=seed, folder=version_folder(models, "digits", seed + 1))
            for seed in (0, 1)
        )
        versions = deployed(old, 1, "champion"), deployed(new, 2, "challenger")
        write_deployment(models, REF, versions, Canary(version=2, **canary))
        return old, new

    return lay_out


def deployed(bundle: Bundle, version: int, alias: str | None) -> DeployedVersion:
    return DeployedVersion(version=version, manifest_sha256=bundle.manifest_sha256, alias=alias)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def slot(models: Path, metrics: Metrics) -> ModelSlot:
    return ModelSlot(REF, models, partial(load, metrics=metrics))


@pytest.fixture
def settings() -> Settings:
    return Settings(max_batch=4, max_image_bytes=100_000, max_body_bytes=300_000)


@pytest.fixture
def app(slot: ModelSlot, settings: Settings, metrics: Metrics) -> Flask:
    app = create_app(settings, {"digits": slot}, metrics)
    app.testing = False  # errors are answered, as they are in production
    return app


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    """A client of an app with nothing loaded yet."""
    return app.test_client()


@pytest.fixture
def ready(client: FlaskClient, slot: ModelSlot, deploy: Callable[..., Bundle]) -> FlaskClient:
    """A client of an app that serves version 1."""
    deploy(1)
    assert slot.refresh()
    return client


@contextmanager
def listening(app: Flask) -> Iterator[str]:
    """The URL of ``app`` behind a real socket."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def url(ready: FlaskClient) -> Iterator[str]:
    """The app behind a real socket."""
    with listening(ready.application) as url:
        yield url


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The loader's clock, which stands still: ``clock.now`` in seconds."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(version_loader, "time", clock)
    return clock
