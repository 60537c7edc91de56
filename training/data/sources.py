"""Loads a data set by name, split into training, validation and test pictures.

In every source, the SHA-256 of an example's pixels identifies it. This digest also decides its
split, unless the source already names splits (``training.data.split``).
"""

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from registry.core.errors import UsageError
from registry.model.image.decode import Pixels, encode_png
from registry.model.manifest import PreprocessSpec
from training.data import fashion_mnist
from training.data.folder import Split, shown
from training.data.folder_pictures import read_folder, some
from training.data.split import TEST_SHARE, VALIDATION_SHARE, split_by_digest

log = logging.getLogger(__name__)

DEFAULT_SIZE_PX = 64
LOGGED_PROBLEMS = 20
STATISTICS_ROWS = 16


class Examples(Struct, frozen=True):
    """Pictures of one split, in a fixed order.

    Attributes:
        pixels: uint8 (N, height, width, channels).
        labels: int64 (N,), indices into the data set's labels.
        digests: SHA-256 of each picture's content, hexadecimal.
        encode: returns the i-th picture as an encoded file that the service accepts.
    """

    pixels: Pixels
    labels: NDArray[np.int64]
    digests: tuple[str, ...]
    encode: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sha256(self) -> str:
        """One digest for these pictures with these labels in this order."""
        lines = (
            f"{digest} {label}\n" for digest, label in zip(self.digests, self.labels, strict=True)
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()


class Dataset(Struct, frozen=True, kw_only=True):
    """A data set in three splits.

    ``validation`` decides which epoch is kept and which version is promoted; ``test`` is only
    reported. ``problems`` lists the entries of the source that were left out, each with the reason.
    ``notes`` say what was decided about the splits, and which classes have too few pictures.
    """

    name: str
    labels: tuple[str, ...]
    preprocess: PreprocessSpec
    train: Examples
    validation: Examples
    test: Examples
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """One hexadecimal digest for the labels and the pictures of all splits, in order."""
        parts = [*self.labels, self.train.sha256, self.validation.sha256, self.test.sha256]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """The number of pictures of each split; the keys are train, validation and test."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: len(examples) for name, examples in splits.items()}


def load_dataset(source: str, cache: Path, size_px: int | None = None) -> Dataset:
    """The data set that ``source`` names.

    Args:
        source: ``fashion-mnist``, ``fashion-mnist:FOLDER`` (with the four IDX files), ``digits``,
            or ``folder:FOLDER`` with the layout CLASS/… or SPLIT/CLASS/….
        cache: folder for downloads, and for validation pictures while a network trains.
        size_px: width and height of the pictures of ``folder:``; the others have a fixed size.

    Raises:
        UsageError: the source does not exist, or cannot be trained on.
    """
    kind, path, side_px = _parse_source(source, size_px)
    if kind == "fashion-mnist":
        return _fashion_mnist(Path(path) if path else None, cache)
    return _digits() if kind == "digits" else _folder(Path(path), side_px, cache)


def picture_side_px(source: str, size_px: int | None = None) -> int:
    """Height and width of the pictures of ``source``; reads none of them.

    Raises:
        UsageError: the source does not exist.
    """
    return _parse_source(source, size_px)[2]


def _parse_source(source: str, size_px: int | None) -> tuple[str, str, int]:
    """Kind, path and side of the pictures."""
    kind, _, path = source.partition(":")
    if kind != "folder" and size_px is not None:
        raise UsageError(
            f"--image-size applies to folder: data only; the pictures of {kind} have a fixed size"
        )
    if kind == "fashion-mnist":
        return kind, path, 28
    if source == "digits":
        return kind, path, 8
    if kind == "folder" and path:
        return kind, path, size_px or DEFAULT_SIZE_PX
    raise UsageError(
        f"there is no data set {source!r}; use fashion-mnist, fashion-mnist:FOLDER, digits "
        "or folder:FOLDER"
    )


def _fashion_mnist(folder: Path | None, cache: Path) -> Dataset:
    train, train_labels, test, test_labels = fashion_mnist.load(folder, cache)
    everything = _from_arrays(train[..., None], train_labels)
    parts = split_by_digest(everything.digests, validation=1 / 12, test=0.0)
    return _dataset(
        "fashion-mnist",
        fashion_mnist.LABELS,
        {
            "train": take(everything, parts["train"]),
            "validation": take(everything, parts["validation"]),
            "test": _from_arrays(test[..., None], test_labels),
        },
    )


def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # scikit-learn takes a second to import

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    examples = _from_arrays(pixels, bunch.target.astype(np.int64))
    parts = split_by_digest(examples.digests, VALIDATION_SHARE, TEST_SHARE)
    splits = {split: take(examples, positions) for split, positions in parts.items()}
    return _dataset("digits", tuple("0123456789"), splits)


def _folder(root: Path, size_px: int, cache: Path) -> Dataset:
    found = read_folder(root, size_px, cache)
    splits: dict[Split, Examples] = {}
    start = 0
    for split, count in found.counts.items():
        splits[split] = Examples(
            found.pixels[start : start + count],
            found.classes[start : start + count],
            found.digests[start : start + count],
            functools.partial(_encode_from, found.encode, start),
        )
        start += count
    return _dataset(
        f"folder:{shown(root.name)}", found.labels, splits, size_px, found.left_out, found.notes
    )


def _encode_from(encode: Callable[[int], bytes], start: int, index: int) -> bytes:
    return encode(start + index)


def take(examples: Examples, positions: NDArray[np.int64]) -> Examples:
    """The examples at ``positions``, in that order."""
    return Examples(
        examples.pixels[positions],
        examples.labels[positions],
        tuple(examples.digests[position] for position in positions),
        lambda index: examples.encode(int(positions[index])),
    )


def _from_arrays(pixels: Pixels, labels: NDArray[np.int64]) -> Examples:
    """The examples, with one of several equal pictures, and none if their labels differ."""
    digests = tuple(hashlib.sha256(picture.tobytes()).hexdigest() for picture in pixels)
    examples = Examples(pixels, labels, digests, lambda index: encode_png(pixels[index]))
    by_digest: dict[str, list[int]] = {}
    for position, digest in enumerate(digests):
        by_digest.setdefault(digest, []).append(position)
    kept = [equal[0] for equal in by_digest.values() if len(set(labels[equal].tolist())) == 1]
    if dropped := len(digests) - len(kept):
        log.warning("left out %d pictures: copies, or equal pictures with two labels", dropped)
    return take(examples, np.array(kept, np.int64))


def _dataset(
    name: str,
    labels: tuple[str, ...],
    splits: dict[Split, Examples],
    resize_shorter_px: int | None = None,
    problems: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Dataset:
    """The data set, with the mean and deviation of its training pictures for normalisation."""
    for problem in problems[:LOGGED_PROBLEMS]:
        log.warning("left out: %s", problem)
    if problems:
        log.warning("left out %d entries in total; the report names them", len(problems))
    notes += _class_notes(labels, splits)
    for note in notes:
        log.warning("%s", note)
    _check_sizes(name, labels, splits)
    pixels = splits["train"].pixels
    _, height, width, channels = pixels.shape
    mean, std = channel_statistics(pixels)
    return Dataset(
        name=name,
        labels=labels,
        preprocess=PreprocessSpec(
            mode="L" if channels == 1 else "RGB",
            width_px=width,
            height_px=height,
            resize_shorter_px=resize_shorter_px,
            mean=mean,
            std=std,
        ),
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        problems=problems,
        notes=notes,
    )


def _check_sizes(name: str, labels: tuple[str, ...], splits: dict[Split, Examples]) -> None:
    counts = np.bincount(splits["train"].labels, minlength=len(labels))
    if missing := [labels[index] for index in np.flatnonzero(counts == 0)]:
        raise UsageError(
            f"{name}: no training picture of class {some(missing)}; add some, or remove the class"
        )
    total = sum(len(examples) for examples in splits.values())
    for split in ("validation", "test"):
        if not len(splits[split]):
            raise UsageError(
                f"{name}: {total} pictures are too few: the {split} split takes about 15 of 100 "
                "and got none; add pictures, or lay them out as train/CLASS, val/CLASS and "
                "test/CLASS"
            )


def _class_notes(labels: tuple[str, ...], splits: dict[Split, Examples]) -> tuple[str, ...]:
    """A note for each shortage: classes with too few pictures to be learnt, validated or tested."""
    by_split = {
        split: np.bincount(examples.labels, minlength=len(labels))
        for split, examples in splits.items()
    }
    notes = []
    for what, chosen in (
        ("only one picture", sum(by_split.values()) == 1),
        ("no validation picture, so the gate cannot compare them", by_split["validation"] == 0),
        ("no test picture, so the test accuracy does not cover them", by_split["test"] == 0),
    ):
        if names := [labels[index] for index in np.flatnonzero(chosen)]:
            notes.append(f"{len(names)} of {len(labels)} classes have {what}: {some(names)}")
    return tuple(notes)


def channel_statistics(pixels: Pixels) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in units of pixel value / 255."""
    counts = np.zeros((pixels.shape[3], 256), np.int64)
    for start in range(0, len(pixels), STATISTICS_ROWS):  # bincount needs 8 bytes per pixel
        for channel in range(pixels.shape[3]):
            values = pixels[start : start + STATISTICS_ROWS, ..., channel]
            counts[channel] += np.bincount(values.ravel(), minlength=256)
    scale = np.arange(256) / 255
    means = counts @ scale / counts.sum(axis=1)
    variances = [
        float(count @ (scale - mean) ** 2 / count.sum())
        for count, mean in zip(counts, means, strict=True)
    ]
    return (
        tuple(round(float(mean), 6) for mean in means),
        # Pictures of a single colour have a deviation of 0, which nothing can be divided by.
        tuple(max(round(variance**0.5, 6), 1e-3) for variance in variances),
    )
