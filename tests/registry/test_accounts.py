"""What an account with read access can do to the champion, on a real MLflow server."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from msgspec.structs import replace

from registry.cli.reader_account import make_reader
from registry.core.errors import PromotionRefused
from registry.core.paths import Paths
from registry.delivery.deployment import read_deployment
from registry.delivery.puller import Puller
from registry.model.refs import ModelRef, ModelVersion
from registry.promotion.decisions import audit
from registry.promotion.promotion import promote
from registry.store import model_names
from registry.store.audit_log import AuditLog, Entry
from registry.store.audit_log_store import ENTRY_TAG
from registry.store.mlflow_store import ModelStore
from registry.store.model_names import AUDIT_LOG
from tests.conftest import MakeBundle
from tests.mlflow_servers import PASSWORDS, mlflow_server

pytestmark = pytest.mark.e2e
pytest.importorskip("flask_wtf", reason="MLflow's accounts need Flask-WTF: pip install -e '.[dev]'")


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with MLflow's default settings: every account may create models."""
    with mlflow_server(tmp_path_factory.mktemp("open"), workspaces=False) as address:
        yield address


@pytest.fixture
def sign_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that chooses the account of all later calls."""

    def choose(account: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", account)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS[account])

    choose("admin")
    monkeypatch.setattr(model_names, "CLAIM_TIMEOUT_S", 0.0)
    return choose


@pytest.fixture
def store(
    open_server: str, paths: Paths, sign_in: object, monkeypatch: pytest.MonkeyPatch
) -> ModelStore:
    return store_at(open_server, paths, monkeypatch)


def store_at(address: str, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return ModelStore(paths)


def publish(store: ModelStore, make_bundle: MakeBundle, name: str, seed: int = 0) -> ModelVersion:
    from training.publishing.tracking import start_run

    bundle = make_bundle(seed=seed, change=lambda manifest: replace(manifest, model=name))
    with start_run(store, "accounts", name):
        return store.publish(bundle, {"convoy.recipe": "tiny"})


def forge_log(client: MlflowClient, name: str, version: int) -> None:
    """Write a log that says that ``version`` was promoted, as an attacker would."""
    facts: dict[str, Any] = {"action": "promoted", "by": "admin", "from_version": None}
    entry = Entry(**facts, at="2026-11-01T00:00:00+00:00", to_version=version)
    line = AuditLog().continued(entry).to_json().decode()
    client.create_registered_model(name + AUDIT_LOG)
    client.create_model_version(
        name + AUDIT_LOG, f"convoy:/{name}/{version}", tags={ENTRY_TAG: line}, await_creation_for=0
    )


def test_making_the_reader_again_takes_the_rights_of_an_administrator_away(
    open_server: str,
) -> None:
    users, admin = f"{open_server}/api/2.0/mlflow/users", ("admin", PASSWORDS["admin"])
    more = {"username": "reader", "is_admin": True}
    assert requests.patch(f"{users}/update-admin", json=more, auth=admin, timeout=30).ok
    make_reader(open_server, admin, PASSWORDS["reader"])
    reader = ("reader", PASSWORDS["reader"])
    answer = requests.get(f"{users}/get?username=reader", auth=reader, timeout=30)
    assert answer.json()["user"]["is_admin"] is False


def test_a_reader_cannot_make_an_audit_log_once_a_version_is_published(
    store: ModelStore, make_bundle: MakeBundle, sign_in: Callable[[str], None]
) -> None:
    for seed in (0, 1):
        publish(store, make_bundle, "published", seed)
    sign_in("reader")
    with pytest.raises(MlflowException, match="already exists"):
        forge_log(MlflowClient(store.connection.uri), "published", 1)
    with pytest.raises(MlflowException, match="403"):
        MlflowClient(store.connection.uri).create_model_version(
            "published.ledger", "convoy:/published/1"
        )
    sign_in("admin")
    assert promote(store, "published", 2).entry.to_version == 2
    assert store.aliases.read("published")["champion"] == 2
    assert audit(store, "published") == (1, [])


@pytest.mark.parametrize("made", ["log", "model"])
def test_publishing_refuses_a_name_that_a_reader_has_taken(
    store: ModelStore, make_bundle: MakeBundle, sign_in: Callable[[str], None], made: str
) -> None:
    name = f"taken-{made}"
    sign_in("reader")
    client = MlflowClient(store.connection.uri)
    if made == "log":
        forge_log(client, name, 1)
    else:
        client.create_registered_model(name)
    sign_in("admin")
    with pytest.raises(PromotionRefused, match="another account may have made it"):
        publish(store, make_bundle, name)
    assert not store._client.search_model_versions(f"name = '{name}'")


def test_promoting_refuses_an_audit_log_that_a_reader_made_after_the_model(
    store: ModelStore,
    make_bundle: MakeBundle,
    sign_in: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An operator has deleted the log; the reader's log says that version 1 is champion."""
    monkeypatch.setattr(model_names, "LOG_YOUNGER_S", 0.0)
    for seed in (0, 1):
        publish(store, make_bundle, "lost", seed)
    MlflowClient(store.connection.uri).delete_registered_model("lost" + AUDIT_LOG)
    with pytest.raises(PromotionRefused, match="is missing"):
        promote(store, "lost", 2)
    sign_in("reader")
    forge_log(MlflowClient(store.connection.uri), "lost", 1)
    sign_in("admin")
    with pytest.raises(PromotionRefused, match="after the model"):
        promote(store, "lost", 2)
    assert "champion" not in store.aliases.read("lost")
    assert any("after the model" in fault for fault in audit(store, "lost")[1])


def test_with_our_settings_a_reader_cannot_create_anything_and_pulls_the_champion(
    paths: Paths,
    make_bundle: MakeBundle,
    sign_in: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with mlflow_server(tmp_path, workspaces=True) as address:
        store = store_at(address, paths, monkeypatch)
        publish(store, make_bundle, "digits")
        promote(store, "digits", 1)
        sign_in("reader")
        client = MlflowClient(address)
        for attempt in (
            lambda: client.create_registered_model("letters"),
            lambda: client.create_registered_model("letters.ledger"),
            lambda: client.create_experiment("a reader's"),
            lambda: client.set_registered_model_alias("digits", "champion", "1"),
            lambda: client.set_registered_model_tag("digits", "convoy.canary", "{}"),
        ):
            with pytest.raises(MlflowException, match="403"):
                attempt()
        ref = ModelRef("digits", alias="champion")
        assert Puller(lambda: ModelStore(paths), paths, (ref,)).pull_all()
        deployment = read_deployment(paths.models, ref)
        assert deployment is not None
        assert deployment.versions[0].version == 1
