"""Labelled pictures: where they come from, that they are what they claim, and how they are split.

Whatever the source, an example is named by the SHA-256 of its pixels, and that digest alone
decides its split. So equal pictures never straddle training and held-out data, every run splits
alike, and adding pictures moves none of the old ones.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from tqdm import tqdm

from registry.contract import PreprocessSpec
from registry.errors import ConvoyError, UsageError
from registry.preprocess import Pixels, decode_training_image, encode_png
from training import fashion_mnist

log = logging.getLogger(__name__)

DEFAULT_SIZE_PX = 64


class Examples(Struct, frozen=True):
    """Pictures of one split, in a fixed order.

    Attributes:
        pixels: uint8 (N, height, width, channels).
        labels: int64 (N,), indices into the data set's labels.
        digests: SHA-256 of each picture's content, hexadecimal.
        encode: gives the i-th picture as an encoded file that serving accepts.
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
    """A data set, split. ``validation`` chooses (epochs, promotions); ``test`` only reports.

    ``problems`` lists files that were left out and why.
    """

    name: str
    labels: tuple[str, ...]
    preprocess: PreprocessSpec
    train: Examples
    validation: Examples
    test: Examples
    problems: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        parts = [*self.labels, self.train.sha256, self.validation.sha256, self.test.sha256]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: len(examples) for name, examples in splits.items()}


def load_dataset(source: str, cache: Path, size_px: int | None = None) -> Dataset:
    """The data set that ``source`` names.

    Args:
        source: ``fashion-mnist``, ``fashion-mnist:FOLDER`` (with the four IDX files), ``digits``,
            or ``folder:FOLDER`` with one sub-folder of pictures for each class.
        cache: where downloads are kept.
        size_px: width and height for ``folder:``; the others have their own.

    Raises:
        UsageError: no such source, or one that cannot be trained on.
    """
    kind, _, path = source.partition(":")
    if kind != "folder" and size_px is not None:
        raise UsageError(f"--image-size is for folder: data; {kind} pictures have their own size")
    if kind == "fashion-mnist":
        return _fashion_mnist(Path(path) if path else None, cache)
    if source == "digits":
        return _digits()
    if kind == "folder" and path:
        return _folder(Path(path), size_px or DEFAULT_SIZE_PX)
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
        take(everything, parts["train"]),
        take(everything, parts["validation"]),
        _from_arrays(test[..., None], test_labels),
    )


def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # scikit-learn takes a second to import

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    examples = _from_arrays(pixels, bunch.target.astype(np.int64))
    return _split_dataset("digits", tuple("0123456789"), examples)


def _folder(root: Path, size_px: int) -> Dataset:
    if not root.is_dir():
        raise UsageError(f"{root} is no folder")
    labels = tuple(
        sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")
    )
    if len(labels) < 2:
        raise UsageError(
            f"{root} has {len(labels)} sub-folders; a classifier needs one for each of at least "
            "two classes"
        )
    files = [
        (path, index)
        for index, label in enumerate(labels)
        for path in sorted((root / label).rglob("*"))
        if path.is_file() and not _is_hidden(path.relative_to(root))
    ]
    spec = _plain_spec("RGB", size_px, size_px, resize_shorter_px=size_px)
    paths: list[Path] = []
    pixels: list[Pixels] = []
    digests: list[str] = []
    indices: list[int] = []
    problems: list[str] = []
    with ThreadPoolExecutor() as pool:
        read = pool.map(lambda item: _read_picture(item[0], spec), files)
        for (path, index), result in zip(
            files,
            tqdm(read, total=len(files), unit="img", desc="reading pictures", disable=None),
            strict=True,
        ):
            if isinstance(result, str):
                problems.append(f"{path.relative_to(root)}: {result}")
            else:
                paths.append(path)
                pixels.append(result[0])
                digests.append(result[1])
                indices.append(index)
    contradicting = _contradictions(digests, indices)
    problems += [
        f"{path.relative_to(root)}: the same picture lies under another class too"
        for path, digest in zip(paths, digests, strict=True)
        if digest in contradicting
    ]
    for problem in problems:
        log.warning("left out: %s", problem)
    if problems:
        log.warning("left out %d of %d files in all", len(problems), len(files))
    # By digest: renaming a file must not reorder the held-out pictures.
    in_order = sorted(range(len(digests)), key=lambda number: digests[number])
    kept = [number for number in in_order if digests[number] not in contradicting]
    if not kept:
        raise UsageError(f"{root} holds no picture that can be read")
    stacked = np.stack([pixels[number] for number in kept])
    if (stacked == stacked[..., :1]).all():  # all grey: one channel says the same
        stacked = np.ascontiguousarray(stacked[..., :1])
    examples = Examples(
        stacked,
        np.array([indices[number] for number in kept], dtype=np.int64),
        tuple(digests[number] for number in kept),
        lambda index: paths[kept[index]].read_bytes(),
    )
    return _split_dataset(f"folder:{root.name}", labels, examples, size_px, tuple(problems))


def _read_picture(path: Path, spec: PreprocessSpec) -> tuple[Pixels, str] | str:
    """Pixels and digest of a file, or why it has none."""
    try:
        return decode_training_image(path.read_bytes(), spec)
    except (ConvoyError, OSError) as error:
        return str(error)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _contradictions(digests: list[str], indices: list[int]) -> set[str]:
    """Digests of pictures that lie under more than one class."""
    classes: dict[str, int] = {}
    return {
        digest
        for digest, index in zip(digests, indices, strict=True)
        if classes.setdefault(digest, index) != index
    }


def split_by_digest(
    digests: tuple[str, ...], validation: float, test: float
) -> dict[str, NDArray[np.int64]]:
    """Positions of each split: a picture's digest, read as a number in 0..1, decides."""
    position = np.array([int(digest[:12], 16) / 16**12 for digest in digests])
    in_test = position < test
    in_validation = ~in_test & (position < test + validation)
    return {
        "test": np.flatnonzero(in_test),
        "validation": np.flatnonzero(in_validation),
        "train": np.flatnonzero(~in_test & ~in_validation),
    }


def take(examples: Examples, positions: NDArray[np.int64]) -> Examples:
    """The examples at ``positions``, in that order."""
    return Examples(
        examples.pixels[positions],
        examples.labels[positions],
        tuple(examples.digests[position] for position in positions),
        lambda index: examples.encode(int(positions[index])),
    )


def _from_arrays(pixels: Pixels, labels: NDArray[np.int64]) -> Examples:
    digests = tuple(hashlib.sha256(picture.tobytes()).hexdigest() for picture in pixels)
    return Examples(pixels, labels, digests, lambda index: encode_png(pixels[index]))


def _split_dataset(
    name: str,
    labels: tuple[str, ...],
    examples: Examples,
    resize_shorter_px: int | None = None,
    problems: tuple[str, ...] = (),
) -> Dataset:
    parts = split_by_digest(examples.digests, validation=0.15, test=0.15)
    train, validation, test = (
        take(examples, parts[split]) for split in ("train", "validation", "test")
    )
    return _dataset(name, labels, train, validation, test, resize_shorter_px, problems)


def _dataset(
    name: str,
    labels: tuple[str, ...],
    train: Examples,
    validation: Examples,
    test: Examples,
    resize_shorter_px: int | None = None,
    problems: tuple[str, ...] = (),
) -> Dataset:
    """The data set, with the normalisation that its training pictures ask for."""
    counts = Counter(train.labels.tolist())
    if missing := [label for index, label in enumerate(labels) if not counts[index]]:
        raise UsageError(f"{name}: no training picture of class {', '.join(missing)}; add some")
    for split, examples in (("validation", validation), ("test", test)):
        if not len(examples):
            raise UsageError(
                f"{name}: {len(train)} pictures are too few: none fell into the {split} split"
            )
    _, height, width, channels = train.pixels.shape
    mean, std = channel_statistics(train.pixels)
    spec = _plain_spec("L" if channels == 1 else "RGB", width, height, resize_shorter_px, mean, std)
    return Dataset(
        name=name,
        labels=labels,
        preprocess=spec,
        train=train,
        validation=validation,
        test=test,
        problems=problems,
    )


def channel_statistics(pixels: Pixels) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in units of pixel value / 255."""
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(pixels.shape[3]):
        counts = np.bincount(pixels[..., channel].ravel(), minlength=256)
        mean = float(counts @ values / counts.sum())
        variance = float(counts @ (values - mean) ** 2 / counts.sum())
        means.append(round(mean, 6))
        deviations.append(max(round(variance**0.5, 6), 1e-3))  # pictures of one colour
    return tuple(means), tuple(deviations)


def _plain_spec(
    mode: str,
    width_px: int,
    height_px: int,
    resize_shorter_px: int | None,
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    std: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> PreprocessSpec:
    return msgspec.convert(
        {
            "mode": mode,
            "width_px": width_px,
            "height_px": height_px,
            "resize_shorter_px": resize_shorter_px,
            "mean": mean,
            "std": std,
        },
        PreprocessSpec,
    )
