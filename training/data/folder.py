"""Lists a folder of labelled pictures: the files by class and split, and the entries left out.

It reads two layouts: ``CLASS/…`` and ``SPLIT/CLASS/…`` (Keras, torchvision, Ultralytics, Roboflow).
It opens no picture. It names every entry that is neither used nor hidden, with the reason.
"""

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from msgspec import Struct

from registry.core.errors import UsageError

Split = Literal["train", "validation", "test"]

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
HIDDEN = re.compile(r"\.|__MACOSX$")
HOW_TO_LAY_OUT = (
    "lay the pictures out as CLASS/PICTURE, or as train/CLASS/PICTURE, val/CLASS/PICTURE and "
    "test/CLASS/PICTURE"
)


class FoundFile(Struct, frozen=True):
    """A file of a class; ``split`` is None if the folder has no splits."""

    path: Path
    label: str
    split: Split | None = None


class Listing(Struct, frozen=True):
    """All files under the classes of a folder, in the order of their paths.

    Attributes:
        root: the folder.
        files: the files to read; some may turn out not to be pictures.
        splits: the splits that the folder has; none in the layout ``CLASS/…``.
        left_out: entries that are neither used nor hidden, each with the reason.
        labels: of every class folder, in alphabetical order, whether it holds files or not.
    """

    root: Path
    files: list[FoundFile]
    splits: frozenset[Split]
    left_out: list[str]
    labels: list[str]


def list_folder(root: Path) -> Listing:
    """The files of ``root`` by class and, in the layout ``SPLIT/CLASS/…``, by split.

    Links to files are read. A link to a folder outside ``root`` is followed once. A link to a
    folder inside ``root`` would give the same pictures twice, and is left out by name.

    Raises:
        UsageError: ``root`` is not a folder, has fewer than two classes, has a class whose name is
            not UTF-8, or has folders that could be either splits or classes.
    """
    if not root.is_dir():
        raise UsageError(f"{shown(root)} is not a folder")
    tree = _Tree(root)
    folders, loose = tree.entries(root)
    splits = _split_folders(root, folders)
    if splits:
        listing = _list_splits(tree, splits)
        for folder in folders:
            if folder not in splits.values():
                tree.leave_out(folder, "has no class folders in it")
    else:
        listing = _list_classes(tree, folders, None)
    for path in loose:
        tree.leave_out(path, "is not in a class folder")
    labels = sorted({label for label, _ in listing})
    if len(labels) < 2:
        raise UsageError(
            f"{shown(root)} has {len(labels)} sub-folders of pictures; a classifier needs at least "
            f"two classes, with a sub-folder each: {HOW_TO_LAY_OUT}"
        )
    files = [file for _, found in listing for file in found]
    return Listing(root, files, frozenset(splits), tree.left_out, labels)


def shown(path: Path | str) -> str:
    r"""``path`` as text that can be printed and stored; bytes that are not UTF-8 as ``\xe9``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class _Tree:
    """Walks the folders below one root, and remembers which were read and which were left out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out: list[str] = []
        self._real_root = root.resolve()
        self._read: set[Path] = set()

    def leave_out(self, path: Path, reason: str) -> None:
        self.left_out.append(f"{shown(path.relative_to(self.root))}: {reason}")

    def entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Sub-folders and files of ``folder``, sorted by name; other entries are left out."""
        self._read.add(folder.resolve())
        folders: list[Path] = []
        files: list[Path] = []
        try:
            found = sorted(folder.iterdir())
        except OSError as error:
            self.leave_out(folder, f"cannot be read: {error.strerror}")
            return folders, files
        for path in found:
            if HIDDEN.match(path.name):
                continue
            try:
                if reason := self._unusable(path):
                    self.leave_out(path, reason)
                else:
                    (folders if path.is_dir() else files).append(path)
            except OSError as error:
                self.leave_out(path, f"cannot be read: {error.strerror}")
        return folders, files

    def files_below(self, folder: Path) -> list[Path]:
        """Every file below ``folder``, however deep."""
        found: list[Path] = []
        waiting = [folder]
        while waiting:
            folders, files = self.entries(waiting.pop())
            found += files
            waiting += reversed(folders)
        return sorted(found)

    def _unusable(self, path: Path) -> str | None:
        if path.is_dir():
            return self._unusable_folder(path)
        if path.is_file():
            return None
        is_link = path.is_symlink()
        return "is a broken link" if is_link else "is neither a file nor a folder"

    def _unusable_folder(self, path: Path) -> str | None:
        real = path.resolve()
        if path.is_symlink() and (
            real.is_relative_to(self._real_root) or self._real_root.is_relative_to(real)
        ):
            return f"is a link to {shown(real)}, which is already part of the data set"
        return "was already read under another name" if real in self._read else None


def _split_folders(root: Path, folders: list[Path]) -> dict[Split, Path]:
    """The folder of each split; empty in the layout ``CLASS/…``.

    Raises:
        UsageError: the folders could be either splits or classes.
    """
    named = [folder for folder in folders if folder.name.casefold() in SPLIT_NAMES]
    others = [folder for folder in folders if folder not in named]
    if not named:
        return {}
    with_classes = [folder for folder in named if _has_folders(folder)]
    roles = [SPLIT_NAMES[folder.name.casefold()] for folder in with_classes]
    if not with_classes and len(named) == 1 and others and _role(named[0]) != "test":
        return {}  # one class of several is called train: pictures of trains
    problem = None
    if others:
        problem = f"the folder also has {_names(others)}"
    elif len(set(roles)) < len(roles):
        problem = "two of them mean the same split"
    elif "train" not in roles:
        problem = "there is no folder train with a folder for each class in it"
    if problem:
        raise UsageError(
            f"{shown(root)}: {_names(named)} could be splits or classes, and {problem}; "
            f"{HOW_TO_LAY_OUT}, and move or rename everything else"
        )
    return dict(zip(roles, with_classes, strict=True))


def _list_splits(tree: _Tree, splits: dict[Split, Path]) -> list[tuple[str, list[FoundFile]]]:
    listing: list[tuple[str, list[FoundFile]]] = []
    for split, folder in splits.items():
        classes, loose = tree.entries(folder)
        listing += _list_classes(tree, classes, split)
        for path in loose:
            tree.leave_out(path, "is not in a class folder")
    return listing


def _list_classes(
    tree: _Tree, folders: list[Path], split: Split | None
) -> list[tuple[str, list[FoundFile]]]:
    listing = []
    for folder in folders:
        _check_class(tree.root, folder)
        paths = tree.files_below(folder)
        if not paths:
            tree.leave_out(folder, "is a class without a file")
        listing.append((folder.name, [FoundFile(path, folder.name, split) for path in paths]))
    return listing


def _check_class(root: Path, folder: Path) -> None:
    # Python reads bytes that are not UTF-8 as surrogates (Cs).
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in folder.name):
        raise UsageError(
            f"{shown(root)}: the name of the class {shown(repr(folder.name))} is not UTF-8 or "
            "contains control characters; clients would see it as a label, so rename the folder"
        )
    inside = {_role(path) for path in _folders_in(folder)} - {None}
    if len(inside) > 1:
        raise UsageError(
            f"{shown(root)}: {folder.name} contains folders named after splits; {HOW_TO_LAY_OUT}"
        )


def _role(folder: Path) -> Split | None:
    return SPLIT_NAMES.get(folder.name.casefold())


def _has_folders(folder: Path) -> bool:
    return bool(_folders_in(folder))


def _folders_in(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir() and not HIDDEN.match(path.name)]
    except OSError:  # ``_Tree.entries`` reports the error when it reads the folder
        return []


def _names(folders: Iterable[Path]) -> str:
    return ", ".join(f"{shown(folder.name)}/" for folder in folders)
