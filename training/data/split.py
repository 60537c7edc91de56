"""Assigns each example to training, validation or test by the digest of its picture.

So equal pictures are always in the same split, every run splits alike, and a new picture does not
move an old one. There is one exception: if a class has no training picture, its held-out picture
with the highest digest is used for training, until a new picture of the class takes its place.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from training.data.folder import Split

VALIDATION_SHARE = 0.15
TEST_SHARE = 0.15
# A picture in several splits stays in the first of these: training must not see held-out pictures.
PRECEDENCE: tuple[Split, ...] = ("test", "validation", "train")


def split_by_digest(
    digests: Sequence[str], validation: float, test: float
) -> dict[Split, NDArray[np.int64]]:
    """The positions of each split's examples, chosen by the digest as a number from 0 to 1."""
    position = np.array([_position(digest) for digest in digests])
    in_test = position < test
    in_validation = ~in_test & (position < test + validation)
    return {
        "test": np.flatnonzero(in_test),
        "validation": np.flatnonzero(in_validation),
        "train": np.flatnonzero(~in_test & ~in_validation),
    }


def complete_split(
    digests: Sequence[str], labels: Sequence[int], named: Sequence[Split | None]
) -> list[Split]:
    """The split of each example.

    Args:
        digests: of each picture.
        labels: the class of each picture.
        named: the split that the folder gives each picture, or None. If the folder has no
            validation or no test pictures, they are taken from the training pictures.
    """
    has = set(named)
    parts = split_by_digest(
        digests,
        validation=0.0 if "validation" in has else VALIDATION_SHARE,
        test=0.0 if "test" in has else TEST_SHARE,
    )
    splits: list[Split] = ["train"] * len(digests)
    for split, positions in parts.items():
        for position in positions:
            splits[position] = split
    for position, own in enumerate(named):
        if own in ("validation", "test"):
            splits[position] = own
    _leave_some_to_train(digests, labels, named, splits)
    return splits


def straddling(digests: Sequence[str], splits: Sequence[Split | None]) -> list[int]:
    """Positions of examples whose picture is also in a split of higher ``PRECEDENCE``."""
    best: dict[str, int] = {}
    ranks = [len(PRECEDENCE) if split is None else PRECEDENCE.index(split) for split in splits]
    for digest, rank in zip(digests, ranks, strict=True):
        best[digest] = min(rank, best.get(digest, rank))
    return [
        position
        for position, (digest, rank) in enumerate(zip(digests, ranks, strict=True))
        if rank > best[digest]
    ]


def _leave_some_to_train(
    digests: Sequence[str],
    labels: Sequence[int],
    named: Sequence[Split | None],
    splits: list[Split],
) -> None:
    """Give every class a training picture, unless the folder itself holds out all of them."""
    highest: dict[int, str] = {}
    for digest, label, split in zip(digests, labels, named, strict=True):
        if split in (None, "train"):
            highest[label] = max(digest, highest.get(label, digest), key=_position)
    learnt = {label for label, split in zip(labels, splits, strict=True) if split == "train"}
    for position, (digest, label) in enumerate(zip(digests, labels, strict=True)):
        if (
            label not in learnt
            and digest == highest.get(label)
            and named[position] in (None, "train")
        ):
            splits[position] = "train"


def _position(digest: str) -> float:
    return int(digest[:12], 16) / 16**12
