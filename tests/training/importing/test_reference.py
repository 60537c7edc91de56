"""The owner's answers: read, compared, and the cause of a difference named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry.core.errors import UsageError
from registry.model.manifest import PreprocessSpec
from tests.training.importing.conftest import HOME, LABELS, WriteReference
from training.importing.diagnosis import Diagnosis, diagnose
from training.importing.graph import describe, read_graph
from training.importing.owner import OwnerGraph
from training.importing.preprocess_file import make_spec
from training.importing.reference import Reference, compare, read_reference

TOLERANCE = 1e-3


def cause(graph: bytes, reference: Path, members: dict[str, Any]) -> Diagnosis:
    """The diagnosis of an import whose preprocessing has ``members``."""
    facts = describe(read_graph(graph))
    owner = OwnerGraph(graph, facts, facts.scores)
    answers = read_reference(reference, LABELS)
    spec = make_spec(members, 16, 16, 3)

    def score(changed: PreprocessSpec) -> Any:
        return owner.probabilities(answers.decoded(changed), changed)

    assert not compare(score(spec), answers, TOLERANCE).holds
    return diagnose(score, spec, answers, TOLERANCE)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "colour order": ({"mode": "RGB"}, 'colour order: mode = "BGR"'),
    "colour order and mean": (
        {"mode": "RGB", "mean": HOME["mean"][::-1], "std": HOME["std"][::-1]},
        'colour order: mode = "BGR", with mean and std in that order',
    ),
    "interpolation": ({"interpolation": "nearest"}, 'resize: interpolation = "bicubic"'),
    "resampler": ({"resampler": "opencv"}, 'resampler = "pillow"'),
    "crop": ({"resize_shorter_px": 16}, "crop: resize_shorter_px = "),
    "no crop": ({"resize_shorter_px": None}, "resize: resize_shorter_px = "),
    "letterbox": (
        {"resize_shorter_px": None, "letterbox_level": 0},
        "resize: resize_shorter_px = ",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_step_is_named(name: str, graph: bytes, write_reference: WriteReference) -> None:
    change, text = WRONG[name]
    members = {key: value for key, value in {**HOME, **change}.items() if value is not None}
    found = cause(graph, write_reference(), members)
    assert text in str(found)
    assert found.changes[0].step == text.partition(":")[0] or text in found.changes[0].text


@pytest.mark.parametrize("only_labels", [False, True])
def test_a_wrong_normalisation_is_named(
    only_labels: bool, graph: bytes, write_reference: WriteReference, monkeypatch: Any
) -> None:
    monkeypatch.setitem(HOME, "mean", 0.5)
    monkeypatch.setitem(HOME, "std", 0.5)
    reference = write_reference(only_labels)
    found = cause(graph, reference, {**HOME, "mean": 0.0, "std": 1 / 255})
    assert "normalisation: mean = 0.5 and std = 0.5" in str(found)
    assert found.equal == found.total


@pytest.mark.parametrize("only_labels", [False, True])
def test_labels_that_are_shifted_by_one_are_named(
    only_labels: bool, graph: bytes, write_reference: WriteReference
) -> None:
    shifted = (*LABELS[1:], LABELS[0])
    found = cause(graph, write_reference(only_labels, labels=shifted), HOME)
    assert "The cause: the labels: the owner's are 1 later in the list for 24" in str(found)


def test_answers_of_another_model_have_no_cause(
    graph: bytes, write_reference: WriteReference
) -> None:
    file = write_reference()
    rows = file.read_text().splitlines()
    random = np.random.default_rng(0).dirichlet([1, 1, 1], len(rows) - 1)
    lines = [
        f"{row.split(',')[0]},{a},{b},{c}" for row, (a, b, c) in zip(rows[1:], random, strict=True)
    ]
    file.write_text("\n".join([rows[0], *lines]))
    assert cause(graph, file, HOME).equal < 12


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b\n1,2\n", "no column of paths"),
        ("file,score\npictures/00.png,1\n", "neither a column label nor one for each label"),
        ("file,label\npictures/00.png,horse\n", "line 2: the label 'horse' is not in --labels"),
        ("file,label\npictures/none.png,cat\n", r"line 2: the picture .*none\.png does not exist"),
        ("file,cat,dog,fish\npictures/00.png,0.5,x,0.1\n", "line 2: 'x' is not a probability"),
        ("file,cat,dog,fish\npictures/00.png,0.5,nan,0.1\n", "line 2: 'nan' is not a probability"),
        ("file,cat,dog,fish\npictures/00.png,0.5\n", "line 2: None is not a probability"),
        ("file,label\n", "no row"),
        ("", "no column of paths"),
    ],
)
def test_a_reference_that_cannot_be_used_names_the_line(
    text: str, expected: str, tmp_path: Path, pictures: list[Path]
) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(text)
    with pytest.raises(UsageError, match=expected):
        read_reference(file, LABELS)


def test_a_near_tie_may_have_either_class() -> None:
    best = np.array([1])
    reference = Reference((Path("a"),), best, np.full((1, 3), np.nan, np.float32))
    nearly = np.array([[0.4002, 0.4000, 0.1998]], np.float32)
    assert compare(nearly, reference, TOLERANCE).holds
    assert not compare(np.array([[0.5, 0.3, 0.2]], np.float32), reference, TOLERANCE).holds


def test_answers_that_are_not_numbers_equal_nothing() -> None:
    reference = Reference((Path("a.png"),), np.array([0]), np.array([[0.9, 0.1]], np.float32))
    found = compare(np.full((1, 2), np.nan, np.float32), reference, 1e-3)
    assert (found.equal, found.holds) == (0, False)


def test_labels_alone_prove_no_probability() -> None:
    unknown = np.full((1, 2), np.nan, np.float32)
    reference = Reference((Path("a.png"),), np.array([0]), unknown)
    found = compare(np.array([[0.6, 0.4]], np.float32), reference, 1e-3)
    assert (found.holds, found.largest_difference) == (True, None)


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    unknown = np.full((1, 2), np.nan, np.float32)
    reference = Reference((tmp_path / "a.png",), np.array([0]), unknown)
    with pytest.raises(UsageError, match=r"a\.png: "):
        list(reference.decoded(make_spec({"size": 8})))


def test_a_class_may_be_called_class(tmp_path: Path) -> None:
    file = tmp_path / "answers.csv"
    file.write_text("file,class,label\na.png,0.2,0.8\n")
    (tmp_path / "a.png").touch()
    found = read_reference(file, ("class", "label"))
    assert found.best.tolist() == [1]
    np.testing.assert_allclose(found.probabilities, [[0.2, 0.8]])
