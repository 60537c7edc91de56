"""The answers that a model's owner had, and how an import compares with them."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from registry.core.errors import ConvoyError, UsageError
from registry.model.image.decode import Pixels, decode_image
from registry.model.image.limits import TRUSTED_LIMITS
from registry.model.manifest import PreprocessSpec

FILE_COLUMNS = ("file", "path", "uri", "image", "filename")
LABEL_COLUMNS = ("label", "class", "prediction")
PROBABILITY_COLUMNS = ("probability", "score", "confidence")
MAX_ROWS = 100_000


class Evidence(Struct, frozen=True, kw_only=True):
    """What an import is proved with: a folder of pictures, or the owner's answers, or both.

    Raises:
        UsageError: there is neither, or one does not exist.
    """

    examples: Path | None = None
    reference: Path | None = None

    def __post_init__(self) -> None:
        if self.examples is None and self.reference is None:
            raise UsageError(
                "an import needs pictures, to prove each plan with: a folder with --examples, or "
                "the owner's answers with --reference"
            )
        if self.examples is not None and not self.examples.is_dir():
            raise UsageError(f"the folder {self.examples} does not exist")
        if self.reference is not None and not self.reference.is_file():
            raise UsageError(f"the file {self.reference} does not exist")


class Reference(Struct, frozen=True):
    """The owner's answers for N pictures.

    Attributes:
        paths: the picture files.
        best: int64 (N,), the index of the best class.
        probabilities: float32 (N, classes), NaN where the owner gave none.
    """

    paths: tuple[Path, ...]
    best: NDArray[np.int64]
    probabilities: NDArray[np.float32]

    def decoded(self, spec: PreprocessSpec) -> Iterator[Pixels]:
        """The pictures as ``spec`` prepares them, read one after the other.

        Raises:
            UsageError: one cannot be read or decoded; the text names it.
        """
        for path in self.paths:
            try:
                yield decode_image(path.read_bytes(), spec, TRUSTED_LIMITS)
            except (ConvoyError, OSError) as error:
                raise UsageError(f"{path}: {error}") from error

    def take(self, positions: Sequence[int]) -> "Reference":
        """The answers at ``positions``, in that order."""
        index = list(positions)
        return Reference(
            tuple(self.paths[each] for each in index), self.best[index], self.probabilities[index]
        )


class Agreement(Struct, frozen=True):
    """How far answers agree with a reference.

    Attributes:
        total: how many pictures there are.
        equal: how many have the same best class, and no probability over the tolerance.
        same_best: how many have the same best class.
        largest_difference: of a probability that the owner gave; None if there is none.
        first: the position of the first picture that is not equal, or None.
    """

    total: int
    equal: int
    same_best: int
    largest_difference: float | None
    first: int | None

    @property
    def holds(self) -> bool:
        """Whether all answers are equal."""
        return self.equal == self.total


def compare(answers: NDArray[np.float32], reference: Reference, tolerance: float) -> Agreement:
    """Compare probabilities (N, classes) with the owner's.

    If the two best probabilities of a picture are closer than ``tolerance``, both count as best.
    """
    positions = np.arange(len(answers))
    chosen = answers.argmax(axis=1)
    near_tie = answers.max(axis=1) - answers[positions, reference.best] < tolerance
    same_best = (chosen == reference.best) | near_tie
    known = ~np.isnan(reference.probabilities)
    difference = np.max(np.abs(answers - reference.probabilities), axis=1, initial=0.0, where=known)
    equal = same_best & (difference <= tolerance) & np.isfinite(answers).all(axis=1)
    wrong = np.flatnonzero(~equal)
    return Agreement(
        total=len(answers),
        equal=int(equal.sum()),
        same_best=int(same_best.sum()),
        largest_difference=float(difference.max(initial=0)) if known.any() else None,
        first=int(wrong[0]) if wrong.size else None,
    )


def read_reference(file: Path, labels: tuple[str, ...]) -> Reference:
    """The reference in a CSV file.

    It has a column for the picture's path (relative to the file), and either a column for each
    label, with its probability, or a column ``label`` and perhaps ``probability``.

    Raises:
        UsageError: the file cannot be read, or a row cannot be used; the text names its line.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            rows = csv.DictReader(opened)
            columns = list(rows.fieldnames or ())
            path_column = _column(columns, FILE_COLUMNS)
            if path_column is None:
                raise UsageError(f"{file} has no column of paths; name one {FILE_COLUMNS[0]}")
            found = list(_read_rows(file, rows, columns, path_column, labels))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    if not found:
        raise UsageError(f"{file} has no row")
    paths, best, probabilities = zip(*found, strict=True)
    return Reference(paths, np.array(best), np.stack(probabilities))


def _read_rows(
    file: Path,
    rows: "csv.DictReader[str]",
    columns: list[str],
    path_column: str,
    labels: tuple[str, ...],
) -> Iterator[tuple[Path, int, NDArray[np.float32]]]:
    index = {label: position for position, label in enumerate(labels)}
    has_all = all(label in columns for label in labels)
    # A class may be called "class"; its column then has probabilities.
    named = [each for each in columns if not (has_all and each in labels)]
    label_column = _column(named, LABEL_COLUMNS)
    score_column = _column(columns, PROBABILITY_COLUMNS)
    if label_column is None and not has_all:
        raise UsageError(
            f"{file} has neither a column label nor one for each label; its columns: "
            f"{', '.join(columns[:20])}"
        )
    for number, row in enumerate(rows):
        if number >= MAX_ROWS:
            raise UsageError(f"{file} has more than {MAX_ROWS:,} rows")
        where = f"{file}, line {rows.line_num}"
        values = np.full(len(labels), np.nan, np.float32)
        if has_all:
            values[:] = [_number(row[label], where) for label in labels]
        best = int(values.argmax()) if label_column is None else index.get(row[label_column], -1)
        if best < 0:
            raise UsageError(f"{where}: the label {row[label_column or '']!r} is not in --labels")
        if score_column is not None and not has_all and row[score_column]:
            values[best] = _number(row[score_column], where)
        path = file.parent / (row[path_column] or "")
        if not path.is_file():
            raise UsageError(f"{where}: the picture {path} does not exist")
        yield path, best, values


def _column(columns: list[str], names: Sequence[str]) -> str | None:
    return next((each for each in columns if each.strip().lower() in names), None)


def _number(text: Any, where: str) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value <= 1.001:
        raise UsageError(f"{where}: {text!r} is not a probability from 0 to 1")
    return value
