"""``AnswerFile``: the file of answers. It grows row by row, and a later run goes on with it.

A picture that is classified again gets a second row, and the last one counts. So a run only
appends, and a kill at any moment loses at most the row that was being written. A run that ends
rewrites the file without the rows that no longer count. Parquet cannot grow, so a run collects its
rows in JSON lines beside it until the run ends.
"""

import contextlib
import fcntl
import itertools
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

from convoy.classify.rows import (
    COLUMNS,
    Csv,
    Format,
    JsonLines,
    Row,
    from_arrow,
    import_pyarrow,
    parquet_schema,
    to_arrow,
)
from registry.core.errors import UsageError

FORMATS: dict[str, Format] = {".csv": Csv(), ".jsonl": JsonLines(), ".parquet": JsonLines()}
PARTIAL = ".partial.jsonl"
ROW_GROUP = 10_000
MAX_LINE_BYTES = 2**26
ADVICE = "name another file, or start again with --restart"


class NotComparable(UsageError):
    """The rows of a file could not be compared with the rows of this run."""


class _Known(NamedTuple):
    """The row of a picture that counts. ``number`` is its place among all rows.

    ``version`` answered with ``classes`` classes; it is None if there is no answer.
    """

    number: int
    sha256: str
    version: int | None
    classes: int


class KnownRows:
    """What the rows of a file say about each picture; its last row counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, _Known] = {}
        self._models: set[str] = set()
        self._answering: set[int] = set()
        self.count = 0
        """The number of all rows, including those that no longer count."""

    def __len__(self) -> int:
        return len(self._known)

    def note(self, row: Row) -> None:
        """Take note of the next row of the file."""
        version = row.version if row.is_answered else None
        self._known[row.uri] = _Known(self.count, row.sha256, version, len(row.top_k))
        if row.is_answered:
            self._models.add(row.model)
        self.count += 1

    def counts(self, number: int, row: Row) -> bool:
        """Whether ``row``, which is row ``number`` of the file, is the last one of its picture."""
        return self._known[row.uri].number == number

    def check_comparable(
        self, model: str | None, top_k: int, class_count: Callable[[str, int], int | None]
    ) -> None:
        """Refuse to add rows that cannot be compared with the answers in the file.

        Args:
            model: will answer; None if that is unknown.
            top_k: how many classes each answer will have, if the version has so many.
            class_count: returns how many classes a version has, or None if it does not answer now.

        Raises:
            NotComparable: another model gave the answers in the file, or only versions that do not
                answer now, or they have another number of classes.
        """
        if not self._models:
            return
        model = model or min(self._models)
        self.check_model(model)
        found = {
            (each.version, each.classes)
            for each in self._known.values()
            if each.version is not None
        }
        counts = {version: class_count(model, version) for version, _ in found}
        self._answering = {version for version, count in counts.items() if count is not None}
        if found and not self._answering:
            versions = " or ".join(map(str, sorted(counts)))
            raise NotComparable(
                f"{self._path} has answers of {model} version {versions}, which does not answer "
                f"now; {ADVICE}"
            )
        for version, classes in sorted(found):
            count = counts[version]
            if count is not None and classes != min(top_k, count):
                raise NotComparable(
                    f"{self._path} has answers for --top-k {classes}, not {top_k}; "
                    f"use --top-k {classes}, {ADVICE}"
                )

    def check_model(self, model: str) -> None:
        """Raise ``NotComparable`` if another model than ``model`` gave answers in the file."""
        if others := self._models - {model}:
            raise NotComparable(f"{self._path} has answers of {min(others)}, not {model}; {ADVICE}")

    def is_answered(self, uri: str, sha256: str) -> bool:
        """Whether the file has an answer for this content, by a version that answers now.

        ``check_comparable`` finds out which versions do.
        """
        known = self._known.get(uri)
        return known is not None and known.sha256 == sha256 and known.version in self._answering


class AnswerFile:
    """Rows by picture. Open it as a context manager; only one process at a time can do that."""

    def __init__(self, path: Path, *, restart: bool = False) -> None:
        """Check that ``path`` can be written, and write nothing yet.

        Args:
            path: its suffix is ``.csv``, ``.jsonl`` or ``.parquet``; its folder exists.
            restart: whether to replace an existing file instead of continuing it.

        Raises:
            UsageError: the path cannot be used; the message says why.
        """
        self.path = path
        """The file that the user named."""
        self._restart = restart
        self._format = _checked_format(path)
        self._is_parquet = path.suffix.lower() == ".parquet"
        self._rows_path = path.with_name(path.name + PARTIAL) if self._is_parquet else path
        for each in (path, self._rows_path):
            if each.exists() and not (each.is_file() and os.access(each, os.W_OK)):
                raise UsageError(f"{each} is not a file that can be written")
        self.known = KnownRows(path)
        self._copied_rows: int | None = None
        self._file: BinaryIO

    def __enter__(self) -> Self:
        """Read the rows of an earlier run, and cut off a last row that is not complete.

        Raises:
            UsageError: another process writes the file, or this command did not write it.
            OSError: the file cannot be read or written.
        """
        is_copy = not self._restart and self.path.exists() and not self._rows_path.exists()
        if is_copy:
            _copy_parquet(self.path, self._rows_path)
        self._file = self._rows_path.open("r+b" if self._rows_path.exists() else "w+b")
        try:
            self._lock()
            if self._restart:
                self._file.truncate(0)
            self._read_rows()
            self._copied_rows = self.known.count if is_copy else None
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._copied_rows == self.known.count:
            self._rows_path.unlink(missing_ok=True)  # the Parquet file has all of its rows
        # If a row could not be written, closing tries again, and the first error says more.
        with contextlib.suppress(*(() if error is None else (OSError,))):
            self._file.close()

    def append(self, row: Row) -> None:
        """Write a row at once; it replaces an earlier one of the same picture.

        Raises:
            NotComparable: another model gave the answers in the file.
        """
        if row.is_answered:
            self.known.check_model(row.model)
        self._file.write(self._format.encode(row))
        self._file.flush()
        self.known.note(row)

    def finish(self) -> None:
        """Leave one row for each picture in the file that the user named."""
        if self._is_parquet:
            self._write_parquet()
            self._rows_path.unlink()
        elif self.known.count > len(self.known):
            with _replacement(self.path) as temporary, temporary.open("wb") as target:
                target.write(self._format.head.encode())
                target.writelines(map(self._format.encode, self._rows_that_count()))

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"another convoy classify is writing {self._rows_path}; wait until it ends"
            ) from error

    def _read_rows(self) -> None:
        self._file.seek(0)
        first = self._file.readline(MAX_LINE_BYTES)
        end = 0
        if first.endswith(b"\n"):
            end = self._read_records()
        elif not self._format.begins(first):
            raise self._refusal("convoy classify did not write it")
        self._file.seek(end)
        self._file.truncate()
        if end == 0:
            self._file.write(self._format.head.encode())
            self._file.flush()

    def _read_records(self) -> int:
        """Take note of all complete rows; returns the position after the last one."""
        self._file.seek(0)
        end = len(self._format.head)
        try:
            for position, row in self._format.records(self._file):
                self.known.note(row)
                end = position
        except (ValueError, RecursionError) as error:
            raise self._refusal(f"row {self.known.count + 1}: {error}") from error
        return end

    def _refusal(self, reason: str) -> UsageError:
        return UsageError(f"{self._rows_path} cannot be continued: {reason}; {ADVICE}")

    def _rows_that_count(self) -> Iterator[Row]:
        with self._rows_path.open("rb") as file:
            for number, (_, row) in enumerate(self._format.records(file)):
                if self.known.counts(number, row):
                    yield row

    def _write_parquet(self) -> None:
        arrow = import_pyarrow()
        with (
            _replacement(self.path) as temporary,
            arrow.parquet.ParquetWriter(temporary, parquet_schema(arrow)) as writer,
        ):
            rows = self._rows_that_count()
            while group := list(itertools.islice(rows, ROW_GROUP)):
                writer.write_table(to_arrow(group, arrow))


def _checked_format(path: Path) -> Format:
    """The format of an output file; raises ``UsageError`` if it could not be written."""
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise UsageError(f"--output is {path}; its name must end with {', '.join(FORMATS)}")
    if path.suffix.lower() == ".parquet":
        import_pyarrow()
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"the folder of --output, {folder}, does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"the folder of --output, {folder}, cannot be written; choose another")
    return found


def _copy_parquet(path: Path, target_path: Path) -> None:
    """Write the rows of a finished Parquet file as JSON lines.

    Raises:
        UsageError: this command did not write the Parquet file, or it is damaged.
        OSError: a file cannot be read or written.
    """
    parquet = import_pyarrow().parquet
    try:
        with (
            parquet.ParquetFile(path) as file,
            _replacement(target_path) as temporary,
            temporary.open("wb") as target,
        ):
            if tuple(file.schema_arrow.names) != COLUMNS:
                raise ValueError("it has other columns")
            for batch in file.iter_batches(ROW_GROUP):
                rows = map(from_arrow, batch.to_pylist())
                target.writelines(map(JsonLines().encode, rows))
    except (OSError, ValueError) as error:
        # pyarrow raises OSError without a number for a damaged file.
        if getattr(error, "errno", None) is not None:
            raise
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} cannot be continued: {reason}; {ADVICE}") from error


@contextlib.contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """A new file that replaces ``path`` when the block ends; nothing changes if the block fails."""
    path = path.resolve()  # keeps a symbolic link, and replaces the file that it leads to
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        yield temporary
        if path.exists():
            shutil.copymode(path, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
