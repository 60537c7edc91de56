"""Our client for MLflow's SQLite file: it agrees with MLflow's client, and spares its import."""

import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest

from registry.core.errors import RegistryUnavailable, VersionNotFound
from registry.core.paths import Paths
from registry.model.refs import Canary, ModelRef
from registry.promotion.promotion import promote, start_canary
from registry.store.connection.entities import RegistryError
from registry.store.connection.mlflow_sqlite import REVISION, MlflowSqlite, is_supported
from registry.store.mlflow_store import ModelStore
from tests.conftest import Publish

ROOT = Path(__file__).parents[2]


def version_facts(entity: Any) -> tuple[Any, ...]:
    tags, run_id = dict(entity.tags), entity.run_id
    return entity.name, int(entity.version), entity.creation_timestamp, tags, run_id


def model_facts(entity: Any) -> tuple[Any, ...]:
    aliases = {alias: int(version) for alias, version in entity.aliases.items()}
    return entity.name, entity.creation_timestamp, dict(entity.tags), aliases


@pytest.fixture
def database(store: ModelStore, publish: Publish, registry_paths: Paths) -> Path:
    """A registry with three versions, of which the first is deleted, and a canary."""
    for seed in range(3):
        publish(seed=seed)
    promote(store, "digits", 2)
    start_canary(store, "digits", Canary(version=3, share=0.5))
    mlflow.MlflowClient().delete_model_version("digits", "1")
    return registry_paths.root / "mlflow.db"


def test_it_reads_what_mlflows_client_reads(database: Path) -> None:
    mlflow.genai.register_prompt(name="greeting", template="Hello {{name}}")  # not a model
    mlflows = mlflow.MlflowClient()
    ours = MlflowSqlite(database)
    for name in ("digits", "digits.ledger"):
        model = ours.get_registered_model(name)
        assert model_facts(model) == model_facts(mlflows.get_registered_model(name))
        query = f"name = '{name}'"
        theirs = mlflows.search_model_versions(query, order_by=["version_number DESC"])
        assert list(map(version_facts, ours.search_model_versions(query))) == list(
            map(version_facts, theirs)
        )
        newest = ours.search_model_versions(query, max_results=1)
        assert [version_facts(each) for each in newest] == [version_facts(theirs[0])]
        for each in theirs:
            number = str(each.version)
            assert version_facts(ours.get_model_version(name, number)) == version_facts(each)
            assert ours.get_model_version_download_uri(
                name, number
            ) == mlflows.get_model_version_download_uri(name, number)
    assert sorted(map(model_facts, ours.search_registered_models()), key=str) == sorted(
        map(model_facts, mlflows.search_registered_models()), key=str
    )


def test_what_it_writes_is_what_mlflows_client_reads(database: Path) -> None:
    mlflows, ours = mlflow.MlflowClient(), MlflowSqlite(database)
    made = ours.create_registered_model("second", {"a": "b"}, "about it")
    assert model_facts(made) == model_facts(mlflows.get_registered_model("second"))
    assert mlflows.get_registered_model("second").description == "about it"
    for number in (1, 2):
        version = ours.create_model_version("second", "convoy:/x", tags={"n": str(number)})
        assert version.version == number
        found = mlflows.get_model_version("second", str(number))
        assert version_facts(version) == version_facts(found)
        assert (found.source, found.status, found.current_stage) == ("convoy:/x", "READY", "None")
    mlflows.delete_model_version("second", "2")
    assert ours.create_model_version("second", "convoy:/y", tags={}, description="d").version == 3
    assert int(mlflows.create_model_version("second", "convoy:/z", tags={}).version) == 4
    ours.set_registered_model_tag("second", "a", "c")
    ours.set_model_version_tag("second", "3", "k", "v")
    ours.set_registered_model_alias("second", "best", "3")
    ours.set_registered_model_alias("second", "best", "4")
    ours.set_registered_model_alias("second", "worst", "1")
    ours.delete_registered_model_alias("second", "worst")
    model = mlflows.get_registered_model("second")
    assert (model.tags, {alias: int(n) for alias, n in model.aliases.items()}) == (
        {"a": "c"},
        {"best": 4},
    )
    assert mlflows.get_model_version("second", "3").tags == {"k": "v"}


def test_lines_that_threads_append_at_once_get_a_number_each(database: Path) -> None:
    ours = MlflowSqlite(database)
    ours.create_registered_model("log", {})
    with ThreadPoolExecutor(8) as pool:
        made = list(
            pool.map(lambda n: ours.create_model_version("log", "x:/", tags={"n": n}), "abcdefgh")
        )
    assert sorted(each.version for each in made) == list(range(1, 9))
    found = {each.version: each.tags for each in ours.search_model_versions("name = 'log'")}
    assert found == {each.version: each.tags for each in made}


def test_a_name_that_is_taken_and_what_does_not_exist_are_refused(database: Path) -> None:
    ours = MlflowSqlite(database)
    with pytest.raises(RegistryError) as taken:
        ours.create_registered_model("digits", {})
    assert taken.value.error_code == "RESOURCE_ALREADY_EXISTS"
    for refuse in (
        lambda: ours.create_model_version("unknown", "x:/", tags={}),
        lambda: ours.set_registered_model_tag("unknown", "k", "v"),
        lambda: ours.set_model_version_tag("digits", "9", "k", "v"),
        lambda: ours.set_registered_model_alias("digits", "champion", "1"),  # deleted
    ):
        with pytest.raises(RegistryError) as missing:
            refuse()
        assert missing.value.error_code == "RESOURCE_DOES_NOT_EXIST"


@pytest.mark.parametrize(("name", "version"), [("digits", "1"), ("digits", "9"), ("unknown", "1")])
def test_what_is_missing_or_deleted_is_refused(database: Path, name: str, version: str) -> None:
    ours = MlflowSqlite(database)
    for ask in (ours.get_model_version, ours.get_model_version_download_uri):
        with pytest.raises(RegistryError) as refused:
            ask(name, version)
        assert refused.value.error_code == "RESOURCE_DOES_NOT_EXIST"
    with pytest.raises(RegistryError):
        ours.get_registered_model("unknown")


def test_a_reader_restores_the_file_after_a_writer_was_killed(database: Path) -> None:
    """A killed writer leaves a journal, which only a connection that may write can roll back."""
    script = (
        "import os, sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "connection.execute('PRAGMA cache_size = 2')\n"
        "connection.execute('BEGIN IMMEDIATE')\n"
        "for number in range(3000):\n"
        "    connection.execute('INSERT INTO registered_model_tags (key, value, name, workspace)'\n"
        "        ' VALUES (?, ?, ?, ?)', (str(number), 'x' * 500, 'digits', 'default'))\n"
        "os.kill(os.getpid(), 9)"
    )
    ours = MlflowSqlite(database)
    before = ours.get_registered_model("digits")
    ended = subprocess.run([sys.executable, "-c", script, str(database)], check=False)
    assert ended.returncode == -9
    assert database.with_name("mlflow.db-journal").exists()
    assert ours.get_registered_model("digits") == before


def test_names_that_sqlite_cannot_store_are_refused(store: ModelStore) -> None:
    with pytest.raises(RegistryUnavailable):
        store.aliases.read("\udcff")


def test_models_that_mlflow_keeps_elsewhere_are_left_to_mlflow(
    registry_paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{registry_paths.root}/other.db")
    assert not isinstance(ModelStore(registry_paths).connection.client, MlflowSqlite)


def test_a_store_reads_with_it_and_says_what_is_missing(
    database: Path, registry_paths: Paths
) -> None:
    store = ModelStore(registry_paths)
    assert isinstance(store.connection.client, MlflowSqlite)
    with pytest.raises(VersionNotFound, match="digits has no version 9"):
        store.resolve(ModelRef("digits", 9))
    assert store.find("digits", 2) is not None


def test_the_tables_of_the_installed_mlflow_have_the_known_revision(empty_registry: Path) -> None:
    """If this fails after an update of MLflow: compare the tables, then change ``REVISION``."""
    with closing(sqlite3.connect(empty_registry)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [
            (REVISION,)
        ]


def test_tables_of_another_revision_are_left_to_mlflow(registry_paths: Paths) -> None:
    database = registry_paths.root / "mlflow.db"
    assert is_supported(database, workspace=None)
    assert not is_supported(database, workspace="team")
    assert not is_supported(registry_paths.root / "none.db", workspace=None)
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'another'")
    assert not is_supported(database, workspace=None)


@pytest.mark.parametrize(
    "verb",
    [
        ["list"],
        ["show", "digits"],
        ["history", "digits"],
        ["audit"],
        ["promote", "digits", "3", "--force", "--reason", "a test", "--skip-latency"],
        ["canary", "stop", "digits"],
    ],
    ids=" ".join,
)
def test_verbs_do_not_import_mlflow(database: Path, registry_paths: Paths, verb: list[str]) -> None:
    code = (
        "import sys; from convoy.__main__ import main; status = main(sys.argv[1:]); "
        "sys.exit(status or 'mlflow' in sys.modules)"
    )
    environment = {**os.environ, "CONVOY_HOME": str(registry_paths.root)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    ended = subprocess.run(
        [sys.executable, "-c", code, *verb],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
