"""Reads a folder of labelled pictures as arrays, and decides which are used and in which split."""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from registry.core.errors import UsageError
from registry.model.image.decode import Pixels
from registry.model.manifest import PreprocessSpec
from training.data.folder import FoundFile, Listing, Split, list_folder, shown
from training.data.memory import check_memory
from training.data.pictures import (
    KeptFiles,
    ReadPictures,
    keep_heldout,
    put_in_order,
    read_pictures,
)
from training.data.split import complete_split, straddling


class FolderPictures(Struct, frozen=True, kw_only=True):
    """The pictures of a folder: first training, then validation, then test pictures.

    Attributes:
        labels: the classes, in alphabetical order.
        pixels: uint8 (N, height, width, channels).
        classes: int64 (N,), indices into ``labels``.
        digests: SHA-256 of each picture.
        counts: how many pictures each split has, in the order of ``pixels``.
        encode: returns the i-th picture as an encoded file that the service accepts.
        left_out: entries of the folder that are not used, each with the reason.
        notes: what was decided about the splits.
    """

    labels: tuple[str, ...]
    pixels: Pixels
    classes: NDArray[np.int64]
    digests: tuple[str, ...]
    counts: dict[Split, int]
    encode: Callable[[int], bytes]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def read_folder(root: Path, size_px: int, cache: Path) -> FolderPictures:
    """The pictures of ``root``, each resized to ``size_px`` by ``size_px``.

    Args:
        root: a folder in one of the layouts of ``training.data.folder``.
        size_px: the shorter side is resized to this, and the centre is cut out.
        cache: folder for a temporary copy of the validation pictures' files.

    Raises:
        UsageError: the folder cannot be trained on, or its pictures would not fit into memory.
    """
    listing = list_folder(root)
    check_memory(
        f"{len(listing.files):,} files as pictures of {size_px}×{size_px} px",
        len(listing.files) * size_px * size_px * 3,
        f"use fewer pictures or smaller ones, for example --image-size {max(8, size_px // 2)}",
    )
    spec = PreprocessSpec(
        mode="RGB",
        width_px=size_px,
        height_px=size_px,
        resize_shorter_px=size_px,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    read = read_pictures([file.path for file in listing.files], spec)
    if read.pixels.shape[3] == 1:
        spec = msgspec.structs.replace(spec, mode="L", mean=(0.0,), std=(1.0,))
    choice = _Choice(listing, read)
    choice.leave_out_contradictions()
    choice.leave_out_straddling()
    choice.leave_out_copies()
    labels = choice.choose_labels()
    splits = choice.split(labels)
    kept = KeptFiles(cache)
    splits["validation"] = choice.keep(splits["validation"], spec, kept)
    order = [row for rows in splits.values() for row in rows]
    put_in_order(read.pixels, order)
    paths = [choice.files[row].path for row in order]
    classes = {label: index for index, label in enumerate(labels)}
    first_kept = len(splits["train"])
    end_kept = first_kept + len(splits["validation"])

    def encode(index: int) -> bytes:
        if first_kept <= index < end_kept:
            return kept.read(index - first_kept)
        return paths[index].read_bytes()

    return FolderPictures(
        labels=labels,
        pixels=read.pixels[: len(order)],
        classes=np.array([classes[choice.files[row].label] for row in order], np.int64),
        digests=tuple(read.digests[row] for row in order),
        counts={split: len(rows) for split, rows in splits.items()},
        encode=encode,
        left_out=tuple(choice.left_out),
        notes=tuple(choice.notes),
    )


def some(names: Sequence[str], most: int = 10) -> str:
    """The first of ``names``, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class _Choice:
    """Decides which pictures are used. A row is a picture's position in ``read``."""

    def __init__(self, listing: Listing, read: ReadPictures) -> None:
        self.left_out = list(listing.left_out)
        self.notes: list[str] = []
        self.files = [listing.files[position] for position in read.positions]
        self._listing = listing
        self._read = read
        self._rows = list(range(len(self.files)))
        for position, reason in read.left_out:
            self._leave_out(listing.files[position].path, reason)

    def leave_out_contradictions(self) -> None:
        """Leave out pictures that appear under more than one class."""
        classes: dict[str, str] = {}
        contradicting = {
            self._read.digests[row]
            for row in self._rows
            if classes.setdefault(self._read.digests[row], self.files[row].label)
            != self.files[row].label
        }
        self._drop(
            {row for row in self._rows if self._read.digests[row] in contradicting},
            "the same picture also appears under another class",
        )

    def leave_out_straddling(self) -> None:
        """Leave out training pictures also held out, and validation pictures also in test."""
        found = straddling(
            [self._read.digests[row] for row in self._rows],
            [self.files[row].split for row in self._rows],
        )
        rows = {self._rows[position] for position in found}
        self._drop(rows, "the same picture is held out in another split")
        if rows:
            training = sum(self.files[row].split == "train" for row in rows)
            self.notes.append(
                f"{training} pictures were removed from training, and {len(rows) - training} from "
                "validation, because another split holds out the same pictures"
            )

    def leave_out_copies(self) -> None:
        """Leave out all but the first of equal pictures: a copy would count the picture twice."""
        first: dict[str, int] = {}
        copies = {
            row for row in self._rows if first.setdefault(self._read.digests[row], row) != row
        }
        self._drop(copies, "is a copy of another picture of its class")

    def choose_labels(self) -> tuple[str, ...]:
        """The classes with pictures; a class without a readable picture is left out.

        Raises:
            UsageError: there are fewer than two, or a held-out class has no training picture.
        """
        root = shown(self._listing.root)
        if not self._rows:
            raise UsageError(
                f"{root} contains no picture that can be read; add pictures, or name another folder"
            )
        labels = sorted({self.files[row].label for row in self._rows})
        if self._listing.splits:
            train = {file.label for file in self._used_files() if file.split == "train"}
            if missing := [label for label in labels if label not in train]:
                raise UsageError(
                    f"{root}: no training picture of class {some(missing)}, which has held-out "
                    "pictures; add some to train/, or remove the class"
                )
        for label in self._listing.labels:
            if label not in labels:
                self.left_out.append(f"{label}: is a class without a picture that can be read")
        if len(labels) < 2:
            raise UsageError(
                f"{root}: only the class {some(labels)} has pictures; add pictures of another class"
            )
        return tuple(labels)

    def split(self, labels: Sequence[str]) -> dict[Split, list[int]]:
        """Rows by split, ordered by digest, so that renaming a file does not reorder them."""
        digests = self._read.digests
        classes = {label: index for index, label in enumerate(labels)}
        splits = complete_split(
            [digests[row] for row in self._rows],
            [classes[file.label] for file in self._used_files()],
            [file.split for file in self._used_files()],
        )
        by_split: dict[Split, list[int]] = {"train": [], "validation": [], "test": []}
        for row, split in zip(self._rows, splits, strict=True):
            by_split[split].append(row)
        for split, rows in by_split.items():
            rows.sort(key=lambda row: digests[row])
            if self._listing.splits and split not in self._listing.splits:
                self.notes.append(
                    f"the folder has no {split} split: {len(rows)} of its training pictures were "
                    "chosen for it by their digests"
                )
        return by_split

    def keep(self, rows: list[int], spec: PreprocessSpec, kept: KeptFiles) -> list[int]:
        """The ``rows`` whose files were copied into ``kept``; files that changed are left out."""
        paths = [self.files[row].path for row in rows]
        problems = keep_heldout(paths, (self._read.pixels[row] for row in rows), spec, kept)
        for path, problem in zip(paths, problems, strict=True):
            if problem is not None:
                self._leave_out(path, problem)
        return [row for row, problem in zip(rows, problems, strict=True) if problem is None]

    def _used_files(self) -> list[FoundFile]:
        return [self.files[row] for row in self._rows]

    def _drop(self, rows: set[int], reason: str) -> None:
        for row in sorted(rows):
            self._leave_out(self.files[row].path, reason)
        self._rows = [row for row in self._rows if row not in rows]

    def _leave_out(self, path: Path, reason: str) -> None:
        self.left_out.append(f"{shown(path.relative_to(self._listing.root))}: {reason}")
