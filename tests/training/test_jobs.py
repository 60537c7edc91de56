"""Runs the command line up to a registered version, in this process and on real digits."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import msgspec
import numpy as np
import pytest

from registry.core.errors import BundleInvalid, PromotionRefused, RegistryUnavailable, UsageError
from registry.core.paths import Paths
from registry.model.refs import ModelRef
from registry.store.mlflow_store import ModelStore
from tests.conftest import CPU, MakeBundle
from tests.training.pictures import pictures
from training import jobs
from training.__main__ import main
from training.data.sources import Dataset, load_dataset
from training.fitting.checkpoint import checkpoint_file, only_training
from training.fitting.loop import fit
from training.fitting.recipes import Recipe
from training.publishing import publish, report
from training.publishing.evaluate import Evaluation
from training.publishing.publish import choose_golden, rescore
from training.publishing.publish import publish as publish_version

QUICK = ["--data", "digits", "--device", "cpu", "--set", "epochs=1", "--set", "batch_size=64"]
SMALL = ["--set", "filters=4", "--set", "hidden=16"]


def test_training_ends_with_a_challenger_and_its_run(
    registry_paths: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK, *SMALL, "--recipe", "cnn", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["version"]) == ("digits", 1)
    store = ModelStore(registry_paths)
    version = store.resolve(ModelRef("digits", alias="challenger"))
    assert version.run_id == result["run_id"]
    run = mlflow.get_run(result["run_id"])
    assert run.data.metrics["test_accuracy"] == pytest.approx(result["test_accuracy"])
    assert run.data.params["network.filters"] == "4"
    assert run.data.tags["interrupted"] == "False"
    assert len(run.data.tags["data.sha256"]) == 64
    client = mlflow.MlflowClient()
    pictures = {Path(item.path).name for item in client.list_artifacts(run.info.run_id, "report")}
    assert {"report.html", "learning_curves.png", "confusion_matrix.png"} <= pictures
    assert not list(registry_paths.checkpoints.glob("*"))


@pytest.fixture
def without_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish without graphs for other engines: exporting takes longer than this training."""
    monkeypatch.setattr(publish, "export_network", lambda *_: {})


@pytest.mark.slow
@pytest.mark.usefixtures("without_exports")
def test_the_summary_names_the_command_that_promotes_the_version(
    registry_paths: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK, "--recipe", "dense", "--model", "mine"]) == 0
    out = capsys.readouterr().out
    assert "convoy promote mine 1" in out
    assert main([*QUICK, "--recipe", "dense", "--no-register"]) == 0
    assert "promote" not in capsys.readouterr().out


@pytest.mark.usefixtures("without_exports")
@pytest.mark.slow
def test_a_training_can_be_resumed_when_the_registry_fails_at_the_end(
    registry_paths: Paths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object) -> None:
        raise RegistryUnavailable("the registry went down meanwhile")

    original = publish_version
    monkeypatch.setattr(jobs, "publish", down)
    assert main([*QUICK, "--recipe", "dense"]) == 2
    assert "went down meanwhile" in capsys.readouterr().err
    (checkpoint,) = registry_paths.checkpoints.iterdir()
    monkeypatch.setattr(jobs, "publish", original)
    assert main([*QUICK, "--recipe", "dense", "--resume"]) == 0
    assert not checkpoint.exists()


def test_labels_that_cannot_be_published_are_refused_before_training(
    registry_paths: Paths, few_digits: Dataset, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it trained")

    monkeypatch.setattr(jobs, "fit", never)
    twins = msgspec.structs.replace(few_digits, labels=("1", *few_digits.labels[1:]))
    with pytest.raises(UsageError, match="digits cannot be published: labels must differ"):
        jobs.train_and_publish(twins, recipe, "digits", registry_paths, device="cpu")


@pytest.mark.slow
def test_a_run_without_a_version_does_not_check_the_model_or_the_labels(
    registry_paths: Paths,
    few_digits: Dataset,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = mlflow.MlflowClient(ModelStore(registry_paths).connection.uri)
    client.create_registered_model("digits")  # its log is missing
    twins = msgspec.structs.replace(few_digits, labels=("1", *few_digits.labels[1:]))
    monkeypatch.setattr("registry.store.model_names.CLAIM_TIMEOUT_S", 0.0)
    train = functools.partial(jobs.train_and_publish, twins, recipe, "digits", registry_paths)
    with pytest.raises(PromotionRefused, match="log"):
        train(device="cpu")
    assert train(device="cpu", register=False)[1] is None


@pytest.mark.parametrize("made", [("digits.ledger",), ("digits.ledger", "digits")])
def test_a_name_that_has_no_version_is_refused_before_training(
    store: ModelStore,
    few_digits: Dataset,
    recipe: Recipe,
    registry_paths: Paths,
    made: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This happens if publishing ended before its version, or an operator deleted all versions."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it trained")

    monkeypatch.setattr(jobs, "fit", never)
    monkeypatch.setattr("registry.store.model_names.CLAIM_TIMEOUT_S", 0.0)
    for name in made:
        mlflow.MlflowClient().create_registered_model(name)
    with pytest.raises(PromotionRefused, match="A publication may have ended before its version"):
        jobs.train_and_publish(few_digits, recipe, "digits", registry_paths, device="cpu")


@pytest.mark.slow
def test_a_drawing_that_fails_stops_neither_the_report_nor_the_publication(
    registry_paths: Paths,
    few_digits: Dataset,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such font")

    monkeypatch.setattr(report, "confusion_matrix", fail)
    priced = msgspec.structs.replace(
        few_digits, labels=("low_$0_$5", "Ca$$h", r"\frac{1}", "日本", *few_digits.labels[4:])
    )
    finished, version = jobs.train_and_publish(
        priced, recipe, "digits", registry_paths, device="cpu"
    )
    assert version is not None
    assert caplog.text.count("the report lacks a drawing") == 2  # before and after training
    folder = mlflow.artifacts.download_artifacts(run_id=finished.run_id, artifact_path="report")
    page = Path(folder, "report.html").read_text()
    assert "Could not be drawn: confusion matrix (ValueError: no such font)." in page
    assert {"worst_mistakes.png", "example_picture.png"} <= {p.name for p in Path(folder).iterdir()}


def test_a_registry_that_does_not_answer_for_an_epoch_does_not_end_the_training(
    registry_paths: Paths,
    few_digits: Dataset,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    original = mlflow.log_metrics
    calls = 0

    def fail_at_first(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise mlflow.exceptions.MlflowException("connection refused\nat length")
        return original(*arguments, **named)

    monkeypatch.setattr(mlflow, "log_metrics", fail_at_first)
    finished, _ = jobs.train_and_publish(
        few_digits, recipe, "digits", registry_paths, device="cpu", register=False
    )
    assert caplog.text.count("metrics will be logged later, and training goes on") == 1
    history = mlflow.MlflowClient().get_metric_history(finished.run_id, "validation_loss")
    assert [metric.step for metric in history] == [1, 2]


def test_two_processes_cannot_train_the_same_run_at_once(
    registry_paths: Paths, few_digits: Dataset, recipe: Recipe
) -> None:
    file = checkpoint_file(registry_paths, few_digits, recipe, 0)
    with only_training(file):
        with pytest.raises(UsageError, match="another training of the same data, recipe and seed"):
            jobs.train_and_publish(few_digits, recipe, "digits", registry_paths, device="cpu")
        with only_training(checkpoint_file(registry_paths, few_digits, recipe, 1)):
            pass
    with only_training(file):
        pass
    assert list(registry_paths.checkpoints.iterdir()) == []


def test_each_picture_size_has_a_checkpoint_of_its_own(
    registry_paths: Paths, tmp_path: Path, recipe: Recipe
) -> None:
    folder = tmp_path / "pictures"
    pictures(folder / "cat", 30, seed=1)
    pictures(folder / "dog", 30, seed=2)
    small, large = (
        load_dataset(f"folder:{folder}", registry_paths.datasets, size_px) for size_px in (16, 32)
    )
    file = checkpoint_file(registry_paths, small, recipe, 0)
    assert checkpoint_file(registry_paths, large, recipe, 0) != file
    fit(recipe, small, CPU, 0, checkpoint=file)
    with pytest.raises(UsageError, match="picture size"):
        fit(recipe, large, CPU, 0, checkpoint=file, resume=True)


def test_a_checkpoint_that_cannot_be_written_or_read_is_reported(
    registry_paths: Paths,
    few_digits: Dataset,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = checkpoint_file(registry_paths, few_digits, recipe, 0)
    file.mkdir(parents=True)  # cannot be replaced by a file
    assert len(fit(recipe, few_digits, CPU, 0, checkpoint=file).history) == recipe.epochs
    assert "the checkpoint of this epoch was not saved" in caplog.text
    file.rmdir()
    file.write_bytes(b"PK damaged")
    with pytest.raises(UsageError, match="cannot be read; delete it"):
        fit(recipe, few_digits, CPU, 0, checkpoint=file, resume=True)
    other = checkpoint_file(registry_paths, few_digits, recipe, 1)
    with pytest.raises(UsageError, match=f"since {file.name} the pictures, the settings"):
        fit(recipe, few_digits, CPU, 1, checkpoint=other, resume=True)


def test_a_version_is_published_even_if_its_pictures_are_deleted_while_it_trains(
    registry_paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pictures"
    pictures(folder / "cat", 30, seed=1)
    pictures(folder / "dog", 30, seed=2)
    original = fit

    def delete_pictures(*arguments: Any, **options: Any) -> Any:
        shutil.rmtree(folder)
        return original(*arguments, **options)

    monkeypatch.setattr(jobs, "fit", delete_pictures)
    words = ["--data", f"folder:{folder}", "--image-size", "16", *QUICK[2:], "--recipe", "dense"]
    assert main([*words, "--set", "epochs=1"]) == 0
    assert ModelStore(registry_paths).aliases.read("pictures") == {"challenger": 1}


@pytest.mark.slow
def test_the_defaults_train_on_digits(
    registry_paths: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", "digits", "--device", "cpu", "--set", "epochs=1", "--no-register"]
    assert main(words) == 0
    assert "cnn on digits: validation accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_recipes_are_compared_on_the_same_pictures(
    registry_paths: Paths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SHIFTS_PX", range(5))
    arguments = ["compare", *QUICK, "--recipes", "dense", "--seeds", "2"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("recipe  test accuracy")
    assert lines[-2].startswith("dense")
    assert "±" in lines[-2]
    run_id = lines[-1].split("MLflow run ")[1].split(",")[0]
    assert "dense_accuracy_shifted_4px" in mlflow.get_run(run_id).data.metrics
    names = {Path(i.path).name for i in mlflow.MlflowClient().list_artifacts(run_id, "report")}
    assert names == {
        "report.html",
        "comparison.json",
        "accuracy.png",
        "accuracy_against_shift.png",
    }


@pytest.mark.slow
def test_ctrl_c_ends_a_comparison_without_counting_the_interrupted_training(
    registry_paths: Paths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fit

    def interrupted(*arguments: Any, **options: Any) -> Any:
        return msgspec.structs.replace(original(*arguments, **options), interrupted=True)

    monkeypatch.setattr(jobs, "fit", interrupted)
    assert main(["compare", *QUICK, "--recipes", "dense", "--seeds", "2"]) == 130
    assert "dense" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--recipe", "vgg"], "there is no recipe 'vgg'"),
        (["--data", "imagenet"], "there is no data set 'imagenet'"),
        (["--data", "folder:/nowhere"], "/nowhere is not a folder"),
        (["--data", "digits", "--model", "a/b"], "not a model name"),
        (["--data", "digits", "--device", "gpu"], "device 'gpu' is not known"),
        (["--data", "digits", "--recipe", "dense", "--resume"], "no checkpoint to resume"),
        (
            ["--data", "digits", "--set", "padding=0", "--set", "pool_size=2"],
            "pool2: a window of 2×2 does not fit its input of 1×1 (padding 0); pool_size of at "
            "most 1 would; for example --set pool_size=2,1",
        ),
        (["--data", "digits", "--set", "epohcs=3"], "did you mean epochs?"),
        (["compare", "--seeds", "0"], "at least 1"),
        (["compare", "--recipes", "dense,dense"], "twice"),
        (["compare", "--recipes", "dense,vgg"], "there is no recipe 'vgg'"),
    ],
)
def test_wrong_arguments_are_answered_with_an_error_of_one_line(
    registry_paths: Paths, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert main(arguments) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(err) == 1
    assert reason in err[0]


def test_the_message_after_ctrl_c_explains_how_to_continue(
    registry_paths: Paths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "fit", interrupted)
    assert main([*QUICK, "--recipe", "dense"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_a_model_is_named_after_its_folder(tmp_path: Path) -> None:
    from training.__main__ import _model_name

    assert _model_name("fashion-mnist:/x") == "fashion"
    assert _model_name("folder:./my pictures/") == "my_pictures"
    assert _model_name("folder:café") == "caf_"


def test_a_bundle_that_does_not_score_like_the_trained_model_is_refused(
    make_bundle: MakeBundle, few_digits: Dataset
) -> None:
    bundle = make_bundle()
    heldout = bundle.heldout()
    honest = Evaluation(heldout.labels, heldout.probabilities)
    rescore(bundle, few_digits.validation, honest, "cpu")
    shifted = heldout.probabilities.copy()
    shifted[7, 0] += 0.001
    with pytest.raises(BundleInvalid, match=r"picture 7 differs by 0\.001"):
        rescore(bundle, few_digits.validation, Evaluation(heldout.labels, shifted), "cpu")
    shifted[7, 0] = np.nan
    with pytest.raises(BundleInvalid, match="picture 7"):
        rescore(bundle, few_digits.validation, Evaluation(heldout.labels, shifted), "cpu")


def test_large_files_become_golden_images_only_if_there_are_no_smaller_ones(
    few_digits: Dataset,
) -> None:
    examples = few_digits.validation
    large = set(choose_golden(examples)[:1])
    padded = msgspec.structs.replace(
        examples,
        encode=lambda index: examples.encode(index) + bytes(600_000 * (index in large)),
    )
    assert not large & set(choose_golden(padded))
    everything_large = msgspec.structs.replace(examples, encode=lambda index: bytes(600_000))
    assert choose_golden(everything_large) == choose_golden(examples)
