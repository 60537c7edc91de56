"""Finds the pictures that a command line names, and reads them."""

import csv
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from msgspec import Struct

from convoy.classify.rows import import_pyarrow
from registry.core.errors import UsageError
from registry.core.names import sha256_hex
from registry.model.image.limits import MAX_FILE_BYTES

# A file in a folder is a picture if its name ends like this. A file that the user names may have
# any name.
JPEG, NETPBM = (".jfif", ".jpe", ".jpeg", ".jpg"), (".pbm", ".pgm", ".pnm", ".ppm")
SUFFIXES = frozenset({".bmp", ".gif", ".png", ".tif", ".tiff", ".webp", *JPEG, *NETPBM})
TABLES = (".csv", ".parquet")
# The columns of a table that may hold the pictures, in this order of preference.
COLUMNS = ("uri", "path", "image")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class Picture(NamedTuple):
    """A picture: ``uri`` as the user names it, the ``path`` of its file, why it is unreadable."""

    uri: str
    path: str
    problem: str = ""


class ReadPicture(NamedTuple):
    """A picture that was read; ``content`` and ``sha256`` are empty if ``problem`` is not."""

    uri: str
    sha256: str
    content: bytes
    problem: str


class Listing(Struct, frozen=True):
    """The pictures in order, and how many entries were skipped, by reason."""

    pictures: tuple[Picture, ...]
    skipped: dict[str, int]


def list_pictures(arguments: Sequence[str]) -> Listing:
    """The pictures that ``arguments`` name, each once.

    Args:
        arguments: paths of pictures, folders, CSV or Parquet tables, and glob patterns.

    Raises:
        UsageError: a pattern finds nothing, a table cannot be used, or two tables give one name to
            different files.
    """
    skipped: Counter[str] = Counter()
    found: dict[str, Picture] = {}
    for argument in arguments:
        for picture in _expand(argument, skipped):
            other = found.setdefault(picture.uri, picture)
            if other is picture:
                continue
            if not _is_same(other.path, picture.path):
                raise UsageError(
                    f"{picture.uri!r} names two files, {other.path} and {picture.path}; "
                    "classify them in two runs"
                )
            skipped["named twice"] += 1
    return Listing(tuple(found.values()), dict(skipped))


def _is_same(first: str, second: str) -> bool:
    """Whether two paths lead to one file."""
    try:
        return os.path.realpath(first) == os.path.realpath(second)
    except ValueError:  # a table may contain null bytes
        return first == second


def read_picture(picture: Picture) -> ReadPicture:
    """The content of a picture's file, or why it cannot be read."""
    if picture.problem:
        return ReadPicture(picture.uri, "", b"", picture.problem)
    try:
        if _is_special(Path(picture.path)):
            return ReadPicture(picture.uri, "", b"", "it is a pipe, a socket or a device")
        with Path(picture.path).open("rb") as file:
            is_large = os.fstat(file.fileno()).st_size > MAX_FILE_BYTES
            content = b"" if is_large else file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return ReadPicture(picture.uri, "", b"", reason)
    if is_large or len(content) > MAX_FILE_BYTES:  # a device has no size
        return ReadPicture(picture.uri, "", b"", f"the file has over {MAX_FILE_BYTES:,} bytes")
    if not content:
        return ReadPicture(picture.uri, "", b"", "the file is empty")
    return ReadPicture(picture.uri, sha256_hex(content), content, "")


def _expand(argument: str, skipped: Counter[str]) -> Iterator[Picture]:
    if glob.has_magic(argument) and not os.path.lexists(argument):
        matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207 - Path.glob refuses absolute ones
        if not matches:
            raise UsageError(f"the pattern {argument!r} finds no file")
        for match in matches:
            yield from _expand_path(match, skipped)
    else:
        yield from _expand_path(argument, skipped)


def _expand_path(path: str, skipped: Counter[str]) -> Iterator[Picture]:
    if Path(path).is_dir():
        yield from _in_folder(Path(path), skipped)
    elif path.lower().endswith(TABLES):
        yield from _in_table(Path(path), skipped)
    else:
        yield Picture(path, path)


def _in_folder(root: Path, skipped: Counter[str]) -> Iterator[Picture]:
    """The pictures in a folder and below it, sorted by name. Each folder is entered once.

    Hidden files and folders are skipped.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            facts, entries = folder.stat(), sorted(folder.iterdir())
        except OSError as error:
            yield Picture(str(folder), str(folder), error.strerror or str(error))
            continue
        if (facts.st_dev, facts.st_ino) in seen:  # a symbolic link leads back
            skipped["folders that a link reaches again"] += 1
            continue
        seen.add((facts.st_dev, facts.st_ino))
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        skipped["hidden"] += len(entries) - len(visible)
        waiting += [entry for entry in reversed(visible) if entry.is_dir()]
        for entry in visible:
            if entry.is_dir():
                continue
            if entry.suffix.lower() not in SUFFIXES:
                skipped["not pictures by their names"] += 1
            elif _is_special(entry):
                skipped["pipes, sockets or devices"] += 1
            else:
                yield Picture(str(entry), str(entry))


def _is_special(entry: Path) -> bool:
    """Whether reading could wait forever: a pipe, a socket or a device. A broken link is not."""
    return entry.exists() and not (entry.is_file() or entry.is_dir())


def _in_table(path: Path, skipped: Counter[str]) -> Iterator[Picture]:
    rows = _parquet_column(path) if path.suffix.lower() == ".parquet" else _csv_column(path)
    for uri in rows:
        if uri:
            yield _from_table(uri, path.parent)
        else:
            skipped["rows without a path"] += 1


def _from_table(uri: str, folder: Path) -> Picture:
    """The picture that a table names: a path relative to the table's folder, or a file:// URI."""
    if uri.startswith("file://"):
        try:
            return Picture(uri, unquote(urlsplit(uri).path))
        except ValueError as error:
            return Picture(uri, uri, f"not a file:// URI ({error})")
    if scheme := SCHEME.match(uri):
        return Picture(uri, uri, f"only files can be read, and not {scheme[0]}…; download it first")
    return Picture(uri, str(folder / uri))


def _csv_column(path: Path) -> Iterator[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            column = _column_of(path, reader.fieldnames or ())
            for row in reader:
                yield row[column] or ""
    except (OSError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as a table: {error}") from error


def _parquet_column(path: Path) -> Iterator[str]:
    parquet = import_pyarrow().parquet
    try:
        with parquet.ParquetFile(path) as file:
            column = _column_of(path, file.schema_arrow.names)
            kind = str(file.schema_arrow.field(column).type)
            if "string" not in kind:
                raise UsageError(f"the column {column} of {path} holds {kind}, and not paths")
            for batch in file.iter_batches(columns=[column]):
                yield from (value or "" for value in batch.column(0).to_pylist())
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise UsageError(f"{path} cannot be read as a table: {error}") from error


def _column_of(path: Path, names: Sequence[str]) -> str:
    for column in COLUMNS:
        if column in names:
            return column
    raise UsageError(
        f"{path} has no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}; its columns are: "
        f"{', '.join(names) or 'none'}"
    )
