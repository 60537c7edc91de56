"""Small files that several processes, also in different containers, read and change.

``locked`` holds one lock from the read to the replacement, so that no process computes a change
from content that another process has replaced since. Readers need no lock: a rename replaces the
file.
"""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"
"""The lock's file name, in each folder that holds such files. The empty file stays there."""

_NEW = ".new"


class LockedFile:
    """A file that no other process changes while ``locked`` holds its folder's lock."""

    def __init__(self, path: Path, mode: int) -> None:
        self._path = path
        self._mode = mode

    def read(self) -> bytes | None:
        """The content; None if the file does not exist. Raises ``OSError``."""
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def replace(self, data: bytes) -> None:
        """Replace the content with ``data``. Readers see only the old or only the new content.

        That also holds after a crash.

        Raises:
            OSError: for example, the disk is full or read-only; the old content is still there.
        """
        # Files that a killed process left.
        for leftover in self._path.parent.glob(f".{self._path.name}.*{_NEW}"):
            leftover.unlink(missing_ok=True)
        # Process ids repeat across containers that share a volume; random names do not.
        temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(8)}{_NEW}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, self._mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _flush_folder(self._path.parent)  # the rename itself


@contextmanager
def locked(path: Path, mode: int = 0o666) -> Iterator[LockedFile]:
    """Keep other processes and threads from changing ``path`` until the block ends.

    Creates the folder if it does not exist. ``mode`` is the file's mode, less the umask.

    Raises:
        OSError: the folder cannot be created or written, or its lock is a symbolic link.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Mode 0600: an account that can open the lock could hold it forever. O_NOFOLLOW: with a link,
    # an account that can write to the folder could choose which file is created or locked.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path.parent / LOCK, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield LockedFile(path, mode)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the content of ``path`` with ``data``; raises as ``LockedFile.replace``."""
    with locked(path) as file:
        file.replace(data)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
