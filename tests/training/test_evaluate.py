from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from registry.model.manifest import ListedNetwork
from registry.model.plans.torch_eager import eager_classifier
from registry.model.preprocessed_model import build_preprocessed
from tests.conftest import tiny_model
from training.data.sources import Dataset
from training.fitting.loop import Epoch
from training.publishing import report
from training.publishing.evaluate import Evaluation, accuracy_against_shift, evaluate, shift

EPOCH = Epoch(
    number=1,
    train_loss=1.0,
    train_accuracy=0.5,
    validation_loss=1.1,
    validation_accuracy=0.4,
    learning_rate=0.1,
    seconds=1.0,
)


def test_the_metrics_of_a_known_case_are_right() -> None:
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]], dtype=np.float32)
    evaluation = Evaluation(np.array([0, 1, 1, 0]), probabilities)
    assert evaluation.accuracy == 0.75
    assert evaluation.confusion().tolist() == [[2, 0], [1, 1]]
    assert evaluation.worst_mistakes(5) == [1]
    assert evaluation.log_loss == pytest.approx(-np.log([0.9, 0.4, 0.8, 0.7]).mean())
    # Each confidence is alone in its bin: gaps 0.1, 0.6, 0.2, 0.3, each of weight 1/4.
    assert evaluation.calibration_error == pytest.approx(0.3, abs=1e-6)
    assert set(evaluation.metrics("test")) == {
        "test_accuracy",
        "test_log_loss",
        "test_calibration_error",
    }


def test_a_shift_moves_the_picture_and_fills_with_black() -> None:
    pixels = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1)
    assert shift(pixels, 1, 0)[0, ..., 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert shift(pixels, 0, -1)[0, ..., 0].tolist() == [[2, 3, 0], [5, 6, 0], [8, 9, 0]]
    assert (shift(pixels, 0, 0) == pixels).all()


def test_accuracy_against_shift_starts_with_the_accuracy_without_a_shift(
    few_digits: Dataset,
) -> None:
    preprocessed = tiny_model(few_digits)
    classifier = eager_classifier(preprocessed, "cpu")
    curve = accuracy_against_shift(classifier, few_digits.test, range(3))
    assert len(curve) == 3
    assert curve[0] == evaluate(classifier, few_digits.test).accuracy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (ListedNetwork("dense"), {"first layer"}),
        (
            ListedNetwork("cnn", {"filters": [4, 8], "padding": 1, "pooling": "average"}),
            {"first layer", *(f"feature maps after {x}" for x in ("conv1", "pool1", "conv2"))},
        ),
        (ListedNetwork("resnet", {"widths": [4]}), {"first layer", "feature maps after conv1"}),
    ],
)
def test_a_run_is_drawn(
    few_digits: Dataset, tmp_path: Path, spec: ListedNetwork, expected: Any
) -> None:
    torch.manual_seed(0)
    preprocessed = build_preprocessed(spec, few_digits.preprocess, 10).eval()
    evaluation = evaluate(eager_classifier(preprocessed, "cpu"), few_digits.test)
    pictures = report.draw_run(preprocessed, [EPOCH], EPOCH, evaluation, few_digits, "cpu").pictures
    always = {"learning curves", "confusion matrix", "worst mistakes", "example picture"}
    assert always | expected <= set(pictures)
    assert all(png.startswith(b"\x89PNG") for png in pictures.values())
    page = report.html_page("a <title>", [("fact", 0.5)], pictures, notes=["a & b"])
    assert "a &lt;title&gt;" in page
    assert "a &amp; b" in page
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "src='http" not in page
    report.write_report(tmp_path / "report", page, pictures)
    assert (tmp_path / "report" / "report.html").read_text() == page
    assert len(list((tmp_path / "report").iterdir())) == len(pictures) + 1


def test_a_perfect_network_and_colour_pictures_can_be_drawn(few_digits: Dataset) -> None:
    labels = few_digits.test.labels
    perfect = Evaluation(labels, np.eye(10, dtype=np.float32)[labels])
    figure = report.worst_mistakes(perfect, few_digits.test, few_digits.labels)
    assert report.to_png(figure).startswith(b"\x89PNG")
    colour = report._one_picture(np.zeros((4, 4, 3), np.uint8), "black")
    assert report.to_png(colour).startswith(b"\x89PNG")


def test_a_comparison_is_drawn() -> None:
    curves = {"dense": [[0.8, 0.5], [0.7, 0.4]], "cnn": [[0.9, 0.8]]}
    assert report.to_png(report.shift_curves(curves)).startswith(b"\x89PNG")
    bars = report.accuracy_bars({"dense": [0.8, 0.7], "cnn": [0.9]})
    assert report.to_png(bars).startswith(b"\x89PNG")
