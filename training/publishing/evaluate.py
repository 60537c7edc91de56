"""Scores a trained classifier on held-out pictures, and on the same pictures moved."""

import numpy as np
from numpy.typing import NDArray

from registry.model.classifier import Classifier
from registry.model.heldout import Scores
from registry.model.image.decode import Pixels
from training.data.sources import Examples


class Evaluation(Scores, frozen=True):
    """The scores of every example of a split, and the metrics computed from them."""

    def confusion(self) -> NDArray[np.int64]:
        """int64 (classes, classes): rows are true classes, columns predicted ones."""
        classes = self.probabilities.shape[1]
        return np.bincount(
            self.labels * classes + self.predicted, minlength=classes * classes
        ).reshape(classes, classes)

    def worst_mistakes(self, count: int) -> list[int]:
        """Positions of the wrongly classified examples, most confident first."""
        wrong = np.flatnonzero(~self.right)
        confidence = self.probabilities[wrong].max(axis=1)
        return [int(position) for position in wrong[np.argsort(-confidence)][:count]]

    def metrics(self, split: str) -> dict[str, float]:
        """Accuracy (0 to 1), log loss (nats) and calibration error (0 to 1).

        The names begin with ``split``: ``test_accuracy``, ``test_log_loss`` and
        ``test_calibration_error``.
        """
        return {
            f"{split}_accuracy": self.accuracy,
            f"{split}_log_loss": self.log_loss,
            f"{split}_calibration_error": self.calibration_error,
        }


def evaluate(classifier: Classifier, examples: Examples) -> Evaluation:
    """The classifier's probabilities for every example, with the true labels."""
    return Evaluation(examples.labels, classifier.classify(examples.pixels))


def accuracy_against_shift(
    classifier: Classifier, examples: Examples, shifts_px: range
) -> list[float]:
    """Accuracy with the pictures moved by each of ``shifts_px`` pixels.

    Each value is the mean over the four directions. Pixels that move in at the edge are black (0).
    """
    accuracies = []
    for distance in shifts_px:
        directions = [(0, distance), (0, -distance), (distance, 0), (-distance, 0)]
        accuracies.append(
            float(
                np.mean(
                    [
                        (
                            classifier.classify(shift(examples.pixels, *direction)).argmax(axis=1)
                            == examples.labels
                        ).mean()
                        for direction in (directions if distance else directions[:1])
                    ]
                )
            )
        )
    return accuracies


def shift(pixels: Pixels, down_px: int, right_px: int) -> Pixels:
    """``pixels`` (N, H, W, C) moved; negative values move up and left."""
    height, width = pixels.shape[1:3]
    moved = np.zeros_like(pixels)
    rows_to = slice(max(0, down_px), height + min(0, down_px))
    rows_from = slice(max(0, -down_px), height + min(0, -down_px))
    columns_to = slice(max(0, right_px), width + min(0, right_px))
    columns_from = slice(max(0, -right_px), width + min(0, -right_px))
    moved[:, rows_to, columns_to] = pixels[:, rows_from, columns_from]
    return moved
