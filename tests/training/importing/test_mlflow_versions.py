"""Versions that MLflow's own ``log_model`` made: listed as what they are, and imported."""

import json
from pathlib import Path
from typing import Any

import mlflow
import onnx
import pytest
import sklearn.linear_model
import torch

from convoy.__main__ import main
from registry.core.errors import UsageError
from registry.core.paths import Paths, convoy_paths
from registry.model.refs import ModelRef
from registry.store import foreign_models
from registry.store.foreign_models import onnx_file
from registry.store.mlflow_store import ModelStore
from tests.training.importing.conftest import LABELS
from tests.training.importing.test_import import SPEC
from training.importing.sources.mlflow_versions import _onnx_graph


@pytest.fixture
def logged(tmp_path: Path, graph: bytes) -> ModelStore:
    """A registry with a version of the flavours onnx, pytorch and sklearn, each of its model."""
    store = ModelStore(convoy_paths())
    mlflow.set_tracking_uri(store.connection.uri)
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    (tmp_path / "spec.toml").write_text(SPEC + "size = 16\n")
    network = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3)
    )
    place = mlflow.create_experiment("elsewhere", artifact_location=(tmp_path / "store").as_uri())
    with mlflow.start_run(experiment_id=place):
        mlflow.onnx.log_model(
            onnx.load_model_from_string(graph), name="m", registered_model_name="Animals-ONNX",
            pip_requirements=[],
        )  # fmt: skip
        mlflow.pytorch.log_model(
            network, name="m", registered_model_name="animals_torch", pip_requirements=[],
            serialization_format="pickle",
        )  # fmt: skip
        mlflow.sklearn.log_model(
            sklearn.linear_model.LinearRegression().fit([[0.0], [1.0]], [0, 1]), name="m",
            registered_model_name="line", pip_requirements=[], serialization_format="cloudpickle",
        )  # fmt: skip
    return store


@pytest.fixture
def run(tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs ``convoy import`` on a version; returns status, output and errors."""

    def run(what: str, *more: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(
            [
                "import", what, "--labels", str(tmp_path / "labels.txt"),
                "--preprocess", str(tmp_path / "spec.toml"),
                "--examples", str(pictures[0].parent), *more,
            ]
        )  # fmt: skip
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_foreign_versions_are_listed_as_what_they_are_and_imported(
    logged: ModelStore,
    run: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capsys.readouterr()
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "not published by Convoy" in out
    assert "onnx, python_function" in out
    assert "convoy import models:/Animals-ONNX/1 --labels" in out
    assert "convoy import models:/animals_torch/1 --run-code --labels" in out
    assert "export it as ONNX" in out
    assert main(["list", "line", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["version"], row["flavours"]) == (
        "line", 1, ["sklearn", "python_function"],
    )  # fmt: skip

    status, out, err = run("models:/Animals-ONNX/1")
    assert status == 0, err
    assert "registered as animals_onnx_imported version 1" in out
    version = logged.resolve(ModelRef("animals_onnx_imported", 1))
    record = logged.manifest(version).imported
    assert record is not None
    assert record.origin == "MLflow, onnx: models:/Animals-ONNX/1"

    status, _, err = run("models:/animals_torch/1")
    assert status == 2
    assert "loading it runs code that it holds" in err
    assert "Add --run-code" in err
    status, out, err = run("models:/animals_torch/1", "--run-code", "--model", "animals")
    assert status == 0, err
    assert "registered as animals version 1" in out

    monkeypatch.setattr(foreign_models, "MAX_FETCHED_BYTES", 1000)
    status, _, err = run("models:/Animals-ONNX/1")
    assert status == 2
    assert "files of 1,000 bytes are imported" in err

    for what, text in {
        "models:/line/1": "is sklearn, python_function; export it as ONNX",
        "models:/line/7": "line has no version 7",
        "models:/line@champion": "name the version by its number",
        "models:/nothing/1": "nothing has no version 1",
    }.items():
        status, _, err = run(what)
        assert status == 2
        assert text in err


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (b"flavors: {2020-13-45: 1}", "unreadable"),
        (b"[" * 3000, "unreadable"),
        (b"flavors: [onnx]", "it names no flavours"),
        (b"flavors: {onnx: x, 3: y}", ""),
        (b"a: 1", "it names no flavours"),
    ],
)
def test_an_odd_record_of_mlflow_does_not_break_the_list(
    record: bytes, text: str, tmp_path: Path, registry_paths: Paths
) -> None:
    store = ModelStore(registry_paths)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "MLmodel").write_bytes(record)
    client = store.connection.client
    client.create_registered_model("odd", {})
    client.create_model_version("odd", (tmp_path / "m").as_uri(), tags={})
    (found,) = store.foreign.newest()
    assert text in found.why
    with pytest.raises(UsageError, match="MLmodel"):
        onnx_file(tmp_path / "m")


def test_weights_that_share_the_bytes_of_one_file_are_refused_before_they_are_read(
    tmp_path: Path, graph: bytes
) -> None:
    model = onnx.load_model_from_string(graph)
    for number in range(300):
        weight = model.graph.initializer.add()
        weight.name, weight.data_type = f"w{number}", onnx.TensorProto.FLOAT
        weight.dims[:] = [1_000_000]
        weight.data_location = onnx.TensorProto.EXTERNAL
        entry = weight.external_data.add()
        entry.key, entry.value = "location", "shared.bin"
    (tmp_path / "shared.bin").write_bytes(bytes(4_000_000))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "MLmodel").write_text("flavors: {onnx: {data: model.onnx}}")
    with pytest.raises(UsageError, match=r"the weights have 1,200,\d+,\d+ bytes; at most"):
        _onnx_graph(tmp_path)
