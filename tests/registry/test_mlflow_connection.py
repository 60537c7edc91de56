"""Opening the registry: in a home that has moved, by several at once, after others tidied up."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from registry.core.errors import BundleInvalid, RegistryUnavailable
from registry.core.paths import Paths
from registry.model.refs import ModelRef, ModelVersion
from registry.store.experiments import open_experiment
from registry.store.mlflow_store import ModelStore
from tests.conftest import Publish
from training.publishing.tracking import start_run


@pytest.fixture
def another_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """MLflow tells its process, in the environment, of the registry that was opened first."""
    return lambda: monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def ref(version: ModelVersion) -> ModelRef:
    return ModelRef(version.name, version.version)


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_home_takes_its_artefacts_along(
    store: ModelStore,
    publish: Publish,
    registry_paths: Paths,
    tmp_path: Path,
    another_process: Callable[[], None],
    how: str,
) -> None:
    version = publish()
    paths = Paths(tmp_path / "a new home")
    if how == "moved":
        registry_paths.root.rename(paths.root)
    else:
        shutil.copytree(registry_paths.root, paths.root)
    before = set(registry_paths.root.rglob("*"))
    another_process()
    moved = ModelStore(paths)
    moved.download(moved.resolve_in({}, ref(version)), tmp_path / "down").verify()
    run = mlflow.MlflowClient(moved.connection.uri).get_run(version.run_id)
    assert run.info.artifact_uri.startswith(paths.artifacts.as_uri())
    with start_run(moved, "convoy", "in the new home") as new:
        mlflow.log_text("report", "report/report.html")
    assert list((paths.artifacts / new.id).rglob("report.html"))
    assert set(registry_paths.root.rglob("*")) == before


def test_experiments_of_others_stay_where_they_are(
    store: ModelStore,
    publish: Publish,
    registry_paths: Paths,
    tmp_path: Path,
    another_process: Callable[[], None],
) -> None:
    publish()
    other = (tmp_path / "elsewhere").as_uri()
    number = mlflow.MlflowClient(store.connection.uri).create_experiment(
        "theirs", artifact_location=other
    )
    paths = Paths(tmp_path / "new")
    registry_paths.root.rename(paths.root)
    another_process()
    found = mlflow.MlflowClient(ModelStore(paths).connection.uri).get_experiment(number)
    assert found.artifact_location == other


@pytest.mark.slow
def test_of_four_who_use_a_new_home_at_once_all_find_a_registry(paths: Paths) -> None:
    command = [sys.executable, "-m", "registry", "list"]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(4)
    ]
    outcomes = [(process.communicate()[0], process.returncode) for process in running]
    assert [code for _, code in outcomes] == [0] * 4, outcomes


def test_a_deleted_experiment_is_restored_with_a_warning(
    store: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    number = open_experiment(store.connection, "convoy")
    client = mlflow.MlflowClient(store.connection.uri)
    client.delete_experiment(number)
    with start_run(store, "convoy", "again") as run:
        pass
    assert client.get_run(run.id).info.status == "FINISHED"
    assert "was deleted; it is restored" in caplog.text


def test_a_version_outlives_the_deletion_of_its_experiment(
    store: ModelStore, publish: Publish, tmp_path: Path
) -> None:
    version = publish()
    mlflow.MlflowClient(store.connection.uri).delete_experiment(
        open_experiment(store.connection, "convoy")
    )
    store.download(store.resolve(ref(version)), tmp_path / "down").verify()


def test_a_run_that_is_deleted_meanwhile_is_one_line(
    store: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    with start_run(store, "convoy", "deleted") as run:
        mlflow.MlflowClient(store.connection.uri).delete_run(run.id)
        with pytest.raises(
            RegistryUnavailable, match=r"Current state is deleted.*Restore it"
        ) as told:
            run.log_metrics({"accuracy": 1.0})
    assert len(str(told.value).splitlines()) == 1


def test_runs_of_the_shell_are_not_taken_over(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "777")
    with start_run(store, "convoy", "own") as run:
        assert run.id != "0" * 32
    assert mlflow.MlflowClient(store.connection.uri).get_run(run.id).info.status == "FINISHED"
    assert f"MLFLOW_RUN_ID={'0' * 32} is ignored" in caplog.text
    assert "MLFLOW_EXPERIMENT_ID=777 is ignored" in caplog.text


def test_names_of_artefacts_are_not_decoded_as_urls(store: ModelStore, tmp_path: Path) -> None:
    source, down = tmp_path / "a place", tmp_path / "down"
    source.mkdir()
    down.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (source / "q?x#y%2f").write_bytes(b"odd")
    store._artifacts.fetch(source.as_uri(), "q?x#y%2f", down, 1000)
    assert (down / "q?x#y%2f").read_bytes() == b"odd"
    for name in ("..%2fsecret", "%2e%2e/secret", "q?x#y%2f/x"):
        with pytest.raises(BundleInvalid, match="is missing"):
            store._artifacts.fetch(source.as_uri(), name, down, 1000)
