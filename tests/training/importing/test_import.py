"""``convoy import``, from the command line to a version that is served and judged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convoy.__main__ import main
from registry.core.errors import BundleInvalid
from registry.core.paths import convoy_paths
from registry.model.classifier import load_classifier
from registry.model.image.decode import decode_image
from registry.model.plans.base import PlanContext, find_plan
from registry.model.refs import ModelRef
from registry.promotion.gate_runner import download_evaluated
from registry.store.mlflow_store import ModelStore
from tests.training.importing.conftest import LABELS, WriteReference
from training.importing.reference import read_reference

Import = Callable[..., tuple[int, str, str]]
SPEC = """
mode = "BGR"
mean = [0.4, 0.45, 0.5]
std = [0.2, 0.25, 0.3]
resize_shorter_px = 20
interpolation = "bicubic"
"""


@pytest.fixture
def run(tmp_path: Path, graph: bytes, capsys: pytest.CaptureFixture[str]) -> Import:
    """Runs ``convoy import`` on the graph; returns status, output and errors."""
    (tmp_path / "animals.onnx").write_bytes(graph)
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    (tmp_path / "spec.toml").write_text(SPEC)

    def run(*words: object, preprocess: str | None = None) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(
            [
                "import",
                str(tmp_path / "animals.onnx"),
                *("--labels", str(tmp_path / "labels.txt")),
                *("--preprocess", preprocess or str(tmp_path / "spec.toml")),
                *map(str, words),
            ]
        )
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def in_folders(pictures: list[Path], reference: Path) -> Path:
    """A folder in which the pictures lie in folders named after their best labels."""
    answers = read_reference(reference, LABELS)
    root = reference.parent / "examples"
    for path, best in zip(pictures, answers.best.tolist(), strict=True):
        target = root / LABELS[best] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return root


@pytest.mark.slow
def test_an_imported_version_answers_as_at_home_and_the_gate_can_judge_it(
    run: Import,
    pictures: list[Path],
    write_reference: WriteReference,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = write_reference()
    status, out, err = run("--reference", reference)
    assert status == 0, err
    assert "registered as animals version 1, alias challenger" in out
    assert "24 of 24 answers are equal" in out
    assert "the gate cannot judge it" in out

    store = ModelStore(convoy_paths())
    bundle = store.download(
        store.resolve(ModelRef("animals", 1)),
        tmp_path / "fetched",
        lambda each: each.serving_files(),
    )
    imported = bundle.manifest.imported
    assert imported is not None
    assert (imported.origin, imported.compared) == ("animals.onnx", 24)
    answers = read_reference(reference, LABELS)
    spec = bundle.manifest.preprocess
    pixels = np.stack([decode_image(path.read_bytes(), spec) for path in pictures])
    for name in ("onnxruntime-fp32", "openvino-fp32"):
        classifier = load_classifier(PlanContext(bundle), find_plan(name))
        np.testing.assert_allclose(classifier.classify(pixels), answers.probabilities, atol=1e-3)

    assert main(["promote", "animals", "1"]) == 0
    capsys.readouterr()
    assert main(["show", "animals", "champion"]) == 0
    assert "imported   animals.onnx" in capsys.readouterr().out
    assert run("--examples", in_folders(pictures, reference), "--model", "animals")[0] == 0
    capsys.readouterr()
    assert main(["evaluate", "animals", "2"]) == 2
    assert "convoy evaluate animals VERSION --data FOLDER" in capsys.readouterr().out


@pytest.mark.slow
def test_a_version_gets_its_held_out_record_later(
    run: Import,
    pictures: list[Path],
    write_reference: WriteReference,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Then the gate compares two imports that had no labels; a damaged record is refused."""
    reference = write_reference()
    assert run("--reference", reference)[0] == 0
    assert main(["promote", "animals", "1"]) == 0
    assert run("--reference", reference)[0] == 0
    labelled = in_folders(pictures, reference)
    capsys.readouterr()
    assert main(["evaluate", "animals", "2", "--skip-latency", "--data", str(labelled)]) == 2
    out = capsys.readouterr().out
    assert "animals version 2: accuracy 1.0000 on 24 pictures" in out
    assert "a version was imported without labelled examples" in out  # the champion
    assert main(["evaluate", "animals", "champion", "--data", str(labelled)]) == 0
    capsys.readouterr()
    status = main(["evaluate", "animals", "2", "--skip-latency"])
    out = capsys.readouterr().out
    assert (status, "challenger 2, champion 1: accepted" in out) == (0, True), out
    assert "24 held-out pictures: 0 gained, 0 lost" in out
    assert main(["show", "animals", "2"]) == 0
    assert "evaluated  examples: 24 pictures, accuracy 1.0000" in capsys.readouterr().out

    store = ModelStore(convoy_paths())
    version = store.resolve(ModelRef("animals", 2))
    assert store.manifest(version).metrics == {}, "the manifest is as it was published"
    for damaged in (tmp_path / "home").rglob("evaluations/*/heldout.npz"):
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    assert main(["evaluate", "animals", "2", "--skip-latency", "--allow-new-classes"]) == 0, (
        "cached"
    )
    with pytest.raises(BundleInvalid, match="sha256"):
        download_evaluated(store, version, tmp_path / "gate", lambda _: ())

    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "a.png").write_bytes(pictures[0].read_bytes())
    assert main(["evaluate", "animals", "2", "--data", str(tmp_path / "bare")]) == 2
    assert "in no folders that are named after labels" in capsys.readouterr().err


def test_a_version_that_answers_differently_is_not_registered(
    run: Import, write_reference: WriteReference, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(SPEC.replace("BGR", "RGB"))
    status, _, err = run("--reference", write_reference(), preprocess=str(wrong))
    assert status == 1
    assert 'The cause: colour order: mode = "BGR"' in err
    assert "With that, 24 of all 24 answers are equal; nothing was registered" in err
    assert ModelStore(convoy_paths()).models() == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("--labels", "two.txt"), "3 scores, and there are 2 labels; --labels needs 3 lines"),
        (("--labels", "twice.txt"), "the label 'cat' is there twice"),
        (("--labels", "gap.txt"), "line 2 is empty"),
        (("--labels", "none.txt"), "cannot be read"),
        (("--output", "z"), "no output 'z'"),
        (("--preprocess", "grey.toml"), '3 channels; use "RGB" or "BGR"'),
        (("--model", "a b"), "a b"),
        ((), "needs pictures"),
    ],
)
def test_a_wrong_argument_names_the_option_that_would_help(
    change: tuple[str, ...], text: str, run: Import, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "two.txt": "cat\ndog\n",
        "twice.txt": "cat\ncat\ndog\n",
        "gap.txt": "cat\n\ndog\n",
        "grey.toml": 'mode = "L"\n',
    }.items():
        (tmp_path / name).write_text(content)
    status, _, err = run(*change, *(("--examples", tmp_path) if change else ()))
    assert status == 2
    assert text in err
