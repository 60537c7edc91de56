"""A bundle's records of its examples: scores of the held-out ones, digests of the training ones.

The gate compares two versions by these records alone, and needs no pictures.
"""

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

CALIBRATION_BINS = 15


class Scores(Struct, frozen=True):
    """The true classes of N examples, and the probabilities that a version gave them.

    Attributes:
        labels: int64 (N,), the true class of each example.
        probabilities: float32 (N, classes).
    """

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """int64 (N,): the most probable class of each example; of equal ones, the first."""
        best: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return best

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether the most probable class of each example is the true one: bool (N,)."""
        right: NDArray[np.bool_] = self.predicted == self.labels
        return right

    @property
    def accuracy(self) -> float:
        """The part of the examples, 0 … 1, whose most probable class is the true one."""
        return float(self.right.mean())

    @property
    def log_loss(self) -> float:
        """Mean negative logarithm of the true class's probability, in nats."""
        truth = self.probabilities[np.arange(len(self.labels)), self.labels]
        return float(-np.log(np.maximum(truth, 1e-12)).mean())

    @property
    def calibration_error(self) -> float:
        """Expected calibration error, 15 equal bins (Guo et al. 2017, arXiv:1706.04599)."""
        confidence = self.probabilities.max(axis=1)
        bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        gaps = np.bincount(bins, self.right - confidence, CALIBRATION_BINS)
        return float(np.abs(gaps).sum() / len(confidence))


class Heldout(Scores, frozen=True):
    """The held-out examples of a version, with its scores.

    Attributes:
        digests: uint8 (N, 32), the SHA-256 of each picture's content.
        perceptual_hashes: uint64 (N,), a difference hash of each picture. It stays nearly equal in
            a lossy copy.
    """

    digests: NDArray[np.uint8]
    perceptual_hashes: NDArray[np.uint64]

    @property
    def short_digests(self) -> NDArray[np.uint64]:
        """uint64 (N,): the first 64 bits of each digest, to compare with a ``TrainingRecord``."""
        first = np.ascontiguousarray(self.digests[:, :8])
        return first.view(">u8").ravel().astype(np.uint64)


class TrainingRecord(Struct, frozen=True):
    """The M training examples of a version.

    Attributes:
        digests: uint64 (M,), the first 64 bits of each picture's SHA-256. The probability that two
            different pictures among a million share them is 3 in 10⁸.
        perceptual_hashes: uint64 (M,), as in ``Heldout``.
    """

    digests: NDArray[np.uint64]
    perceptual_hashes: NDArray[np.uint64]
