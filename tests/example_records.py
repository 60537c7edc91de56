"""Made-up records of examples, in a bundle's formats. Any number can name an example."""

import hashlib
from collections.abc import Iterable

import numpy as np

from registry.model.bundle import HELDOUT, TRAINING, to_npz


def digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def short_digests(numbers: Iterable[int]) -> np.ndarray:
    return np.array([int.from_bytes(digest(each)[:8]) for each in numbers], np.uint64)


def heldout_file(
    labels: np.ndarray,
    probabilities: np.ndarray,
    numbers: Iterable[int] = (),
    perceptual_hashes: np.ndarray | None = None,
) -> dict[str, bytes]:
    """``heldout.npz`` with the examples ``numbers``, by default 0, 1, 2, …"""
    numbers = list(numbers) or range(len(labels))
    names = b"".join(digest(each) for each in numbers)
    data = to_npz(
        labels=labels,
        probabilities=probabilities,
        digests=np.frombuffer(names, np.uint8).reshape(-1, 32),
        perceptual_hashes=short_digests(numbers)
        if perceptual_hashes is None
        else perceptual_hashes,
    )
    return {HELDOUT: data}


def training_file(numbers: Iterable[int] = ()) -> dict[str, bytes]:
    """``training.npz`` with the examples ``numbers``."""
    return {
        TRAINING: to_npz(digests=short_digests(numbers), perceptual_hashes=short_digests(numbers))
    }
