"""Small files that several processes read, change and replace, also from different containers.

``locked`` holds one lock for a whole read-change-replace, so that a change is never computed from
content that another process has replaced since. Readers need no lock: a file is replaced whole.
"""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"
"""In each folder that holds such files; it stays there, empty."""

_NEW = ".new"


class LockedFile:
    """A file that no other process changes while ``locked`` holds its folder's lock."""

    def __init__(self, path: Path, mode: int) -> None:
        self._path = path
        self._mode = mode

    def read(self) -> bytes | None:
        """The content; None when there is no such file. Raises ``OSError``."""
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def replace(self, data: bytes) -> None:
        """Replace the content by ``data``; a reader, or a crash, finds the old or the new whole.

        Raises:
            OSError: the disk is full or read-only, for example; the old content is still there.
        """
        for left in self._path.parent.glob(f".{self._path.name}.*{_NEW}"):  # by a killed process
            left.unlink(missing_ok=True)
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

    The folder is made if there is none. ``mode`` is that of the file, less the umask.

    Raises:
        OSError: the folder cannot be made or written, or its lock is a link.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Private: an account that can open the lock could keep everybody waiting. Through a link, an
    # account that can write the folder would choose which file is made or locked.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path.parent / LOCK, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield LockedFile(path, mode)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, whatever was there; raises as ``LockedFile.replace``."""
    with locked(path) as file:
        file.replace(data)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
