"""Reads picture files into one array, in little more memory than their pixels take.

The array is allocated once and filled in place. Rows are then swapped into order, so that each
split is a slice of the array and not a copy.
"""

import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from msgspec import Struct
from tqdm import tqdm

from registry.core.devices import CORES
from registry.core.errors import ConvoyError, UsageError
from registry.model.image.decode import Pixels, decode_image, decode_training_image
from registry.model.image.limits import TRUSTED_LIMITS, DecodeLimits
from registry.model.manifest import PreprocessSpec
from training.data.folder import shown

Item = TypeVar("Item")
Result = TypeVar("Result")


class ReadPictures(Struct, frozen=True):
    """The files that could be read, in their order.

    Attributes:
        pixels: uint8 (N, height, width, channels); one channel when all pictures are grey.
        digests: SHA-256 of each picture.
        positions: the position of each picture in the list of paths.
        left_out: the position of every other path, and why the file could not be read.
    """

    pixels: Pixels
    digests: list[str]
    positions: list[int]
    left_out: list[tuple[int, str]]


def read_pictures(paths: Sequence[Path], spec: PreprocessSpec) -> ReadPictures:
    """The pictures at ``paths``, decoded to the size of ``spec``, whose mode must be RGB."""
    stack = _Stack(len(paths), (spec.height_px, spec.width_px))
    digests: list[str] = []
    positions: list[int] = []
    left_out: list[tuple[int, str]] = []
    limits = DecodeLimits.from_environment()
    results = _in_threads(lambda path: _read(path, spec, limits), paths)
    bar = tqdm(results, total=len(paths), unit="img", desc="reading pictures", disable=None)
    for position, result in enumerate(bar):
        if isinstance(result, str):
            left_out.append((position, result))
            continue
        stack.add(result[0])
        digests.append(result[1])
        positions.append(position)
    return ReadPictures(stack.pixels, digests, positions, left_out)


def put_in_order(pixels: Pixels, order: Sequence[int]) -> None:
    """Move row ``order[i]`` to row i, in place; takes one row of extra memory.

    Args:
        pixels: at least as many rows as ``order`` has; rows that ``order`` does not name come last.
        order: row numbers, each at most once.
    """
    named = set(order)
    source = [*order, *(row for row in range(len(pixels)) if row not in named)]
    for start in range(len(source)):
        if source[start] == start:
            continue
        held, row = pixels[start].copy(), start
        while source[row] != start:
            pixels[row] = pixels[source[row]]
            source[row], row = row, source[row]
        pixels[row] = held
        source[row] = row


class KeptFiles:
    """Copies of encoded pictures in one temporary file, which the kernel deletes with the process.

    The copies are needed because the original folder may change while a network trains.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as self
        except OSError as error:
            raise _no_room(folder, error) from error
        weakref.finalize(self, self._file.close)
        self._folder = folder
        self._ends = [0]

    def add(self, data: bytes) -> None:
        """Append ``data`` as the next file.

        Raises:
            UsageError: the disk is full, or cannot be written.
        """
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise _no_room(self._folder, error) from error
        self._ends.append(self._ends[-1] + len(data))

    def read(self, index: int) -> bytes:
        """The file with number ``index``, from 0; safe to call from several threads."""
        start, end = self._ends[index], self._ends[index + 1]
        return os.pread(self._file.fileno(), end - start, start)


def keep_heldout(
    paths: Sequence[Path],
    rows: Iterable[Pixels],
    spec: PreprocessSpec,
    kept: KeptFiles,
) -> list[str | None]:
    """Copy each picture's file to ``kept``, if the service would decode it to these ``rows``.

    Returns:
        For each picture None if it was kept, or else the reason.
    """

    def check(item: tuple[Path, Pixels]) -> bytes | str:
        path, pixels = item
        try:
            data = path.read_bytes()
            same = np.array_equal(decode_image(data, spec, TRUSTED_LIMITS), pixels)
        except (ConvoyError, OSError) as error:
            return _reason(error)
        return data if same else "changed while it was being read"

    problems: list[str | None] = []
    results = _in_threads(check, zip(paths, rows, strict=True))
    bar = tqdm(results, total=len(paths), unit="img", desc="keeping validation", disable=None)
    for result in bar:
        problems.append(result if isinstance(result, str) else None)
        if isinstance(result, bytes):
            kept.add(result)
    return problems


class _Stack:
    """An array that grows picture by picture, and to three channels at the first colour picture."""

    def __init__(self, rows: int, size: tuple[int, int]) -> None:
        # The kernel allocates a page only when it is written to, so unused rows cost nothing.
        self._rows = np.empty((rows, *size, 1), np.uint8)
        self._used = 0

    def add(self, picture: Pixels) -> None:
        channels = self._rows.shape[3]
        if channels == 1 and not (picture == picture[..., :1]).all():
            coloured = np.empty((*self._rows.shape[:3], 3), np.uint8)
            coloured[: self._used] = self._rows[: self._used]
            self._rows, channels = coloured, 3
        self._rows[self._used] = picture[..., :channels]
        self._used += 1

    @property
    def pixels(self) -> Pixels:
        return self._rows[: self._used]


def _in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results in the order of ``items``; at most 4 per core are in progress at a time."""
    with ThreadPoolExecutor(CORES) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 4 * CORES:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read(path: Path, spec: PreprocessSpec, limits: DecodeLimits) -> tuple[Pixels, str] | str:
    """Pixels and digest of a file, or the reason why it could not be decoded."""
    try:
        return decode_training_image(path.read_bytes(), spec, limits)
    except (ConvoyError, OSError) as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    return str((isinstance(error, OSError) and error.strerror) or error)


def _no_room(folder: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot copy the validation pictures to {shown(folder)} for publishing: "
        f"{error.strerror}; free some space there, or set CONVOY_HOME to another folder"
    )
