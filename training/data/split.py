"""Which example trains, validates or tests: decided by the digest of its picture.

So equal pictures never straddle the splits, every run splits alike, and a new picture moves no old
one. The one exception: a class without a training picture takes its own held-out picture with the
highest digest, and gives it back when a new picture of the class trains.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from training.data.folder import Split

VALIDATION_SHARE = 0.15
TEST_SHARE = 0.15
# A picture in several splits stays in the first of these: training must not see held-out ones.
PRECEDENCE: tuple[Split, ...] = ("test", "validation", "train")


def split_by_digest(
    digests: Sequence[str], validation: float, test: float
) -> dict[Split, NDArray[np.int64]]:
    """Positions of each split: a picture's digest, read as a number in 0..1, decides."""
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
        digests: of the pictures.
        labels: their classes.
        named: the split that the folder names, for each; or None. Validation and test pictures
            are cut from the training pictures where the folder names none.
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
    """Positions of examples whose picture lies in a split of higher ``PRECEDENCE``, too."""
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
    """Have every class train on a picture, unless the folder itself holds all of them out."""
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
