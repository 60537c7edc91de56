"""From the command line to a registered version, in this process and on real digits."""

import json
from pathlib import Path

import mlflow
import msgspec
import numpy as np
import pytest

from registry.contract import ModelRef
from registry.errors import BundleInvalid, RegistryUnavailable
from registry.home import Home
from registry.store import ModelStore
from tests.conftest import MakeBundle
from training import runs
from training.__main__ import main
from training.datasets import Dataset
from training.evaluate import Evaluation
from training.publish import choose_golden, rescore

QUICK = ["--data", "digits", "--device", "cpu", "--set", "epochs=1", "--set", "batch_size=64"]
SMALL = ["--set", "filters=4", "--set", "hidden=16"]


def test_training_ends_with_a_challenger_and_its_run(registry_home: Home, capsys) -> None:
    assert main([*QUICK, *SMALL, "--recipe", "cnn", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["version"]) == ("digits", 1)
    store = ModelStore(registry_home)
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
    assert not list(registry_home.checkpoints.glob("*"))


def test_the_summary_says_what_to_do_next(registry_home: Home, capsys) -> None:
    assert main([*QUICK, "--recipe", "dense", "--model", "mine"]) == 0
    out = capsys.readouterr().out
    assert "python -m registry promote mine 1" in out
    assert main([*QUICK, "--recipe", "dense", "--no-register"]) == 0
    assert "promote" not in capsys.readouterr().out


def test_a_registry_that_fails_at_the_end_costs_no_training(
    registry_home: Home, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object) -> None:
        raise RegistryUnavailable("the registry went down meanwhile")

    original = runs.publish
    monkeypatch.setattr(runs, "publish", down)
    assert main([*QUICK, "--recipe", "dense"]) == 2
    assert "went down meanwhile" in capsys.readouterr().err
    (checkpoint,) = registry_home.checkpoints.iterdir()
    monkeypatch.setattr(runs, "publish", original)
    assert main([*QUICK, "--recipe", "dense", "--resume"]) == 0
    assert not checkpoint.exists()


def test_recipes_are_compared_on_the_same_pictures(
    registry_home: Home, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "SHIFTS_PX", range(5))
    arguments = ["compare", *QUICK, "--recipes", "dense", "--seeds", "2"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("recipe  test accuracy")
    assert lines[-2].startswith("dense")
    assert "±" in lines[-2]
    run_id = lines[-1].split("mlflow run ")[1].split(",")[0]
    assert "dense_accuracy_shifted_4px" in mlflow.get_run(run_id).data.metrics
    names = {Path(i.path).name for i in mlflow.MlflowClient().list_artifacts(run_id, "report")}
    assert names == {
        "report.html",
        "comparison.json",
        "accuracy.png",
        "accuracy_against_shift.png",
    }


def test_ctrl_c_ends_a_comparison_and_counts_no_half_training(
    registry_home: Home, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = runs.fit

    def interrupted(*arguments, **options):
        return msgspec.structs.replace(original(*arguments, **options), interrupted=True)

    monkeypatch.setattr(runs, "fit", interrupted)
    assert main(["compare", *QUICK, "--recipes", "dense", "--seeds", "2"]) == 130
    assert "dense" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--recipe", "vgg"], "there is no recipe 'vgg'"),
        (["--data", "imagenet"], "there is no data set 'imagenet'"),
        (["--data", "folder:/nowhere"], "/nowhere is not a folder"),
        (["--data", "digits", "--model", "a/b"], "no model name"),
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
def test_wrong_use_is_answered_on_one_line(
    registry_home: Home, capsys, arguments: list[str], reason: str
) -> None:
    assert main(arguments) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(err) == 1
    assert reason in err[0]


def test_ctrl_c_that_stops_everything_says_how_to_go_on(
    registry_home: Home, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "fit", interrupted)
    assert main([*QUICK, "--recipe", "dense"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_a_model_is_named_after_its_folder(tmp_path: Path) -> None:
    from training.__main__ import _model_name

    assert _model_name("fashion-mnist:/x") == "fashion"
    assert _model_name("folder:./my pictures/") == "my_pictures"
    assert _model_name("folder:café") == "caf_"


def test_a_bundle_that_scores_otherwise_is_not_registered(
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


def test_large_files_are_golden_only_for_want_of_others(few_digits: Dataset) -> None:
    examples = few_digits.validation
    large = set(choose_golden(examples)[:1])
    padded = msgspec.structs.replace(
        examples,
        encode=lambda index: examples.encode(index) + bytes(600_000 * (index in large)),
    )
    assert not large & set(choose_golden(padded))
    everything_large = msgspec.structs.replace(examples, encode=lambda index: bytes(600_000))
    assert choose_golden(everything_large) == choose_golden(examples)
