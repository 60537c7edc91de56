"""Moves a connection to a less busy worker when its next request arrives.

Each worker has its own listening socket, and the kernel spreads connections over them by chance. A
kept connection stays where it is, so with a slow model a request waited behind others while another
worker was idle. Each worker therefore tells the others, in shared memory, how many requests it has
postponed, and passes on a connection whose request it has not read yet (``SCM_RIGHTS``, unix(7)).
"""

import contextlib
import mmap
import os
import socket
import time
from array import array
from pathlib import Path

from msgspec import Struct

NEVER = 2**62
"""The load of a worker that takes no connections: it starts or ends."""

SILENT_S = 1.0
"""A worker whose loop has not turned for so long takes no connections: it may hang."""

_SOCKET, _LOAD = ".socket", ".load"
_AT_ONCE = 32


class Peer(Struct, frozen=True):
    """Another worker: where it takes connections, and how many requests it has postponed."""

    address: str
    shared: memoryview

    @property
    def load(self) -> int:
        is_silent = self.shared[1] < (time.monotonic() - SILENT_S) * 1e9
        return NEVER if is_silent else self.shared[0]


class Handover:
    """One worker's part; for its loop's thread only."""

    def __init__(self, folder: Path) -> None:
        """Join the workers that use ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._own = folder / str(os.getpid())
        self._shared = _share(self._own.with_suffix(_LOAD))
        self._shared[0] = NEVER
        self._peers: dict[str, Peer] = {}
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        """Readable when another worker has passed a connection on."""
        self.sock.setblocking(False)
        self._own.with_suffix(_SOCKET).unlink(missing_ok=True)  # of a dead worker with this number
        self.sock.bind(str(self._own.with_suffix(_SOCKET)))

    @property
    def load(self) -> int:
        return self._shared[0]

    @load.setter
    def load(self, value: int) -> None:
        self._shared[0] = value

    def beat(self, now: float) -> None:
        """Tell the others that the loop turns; ``now`` by the monotonic clock."""
        self._shared[1] = int(now * 1e9)

    def find_peers(self) -> None:
        """Learn which other workers there are; forget those that are gone."""
        names = {path.stem for path in self._folder.glob(f"*{_SOCKET}")} - {self._own.stem}
        self._peers = {name: self._peers.get(name) or self._open(name) for name in names}

    def give(self, connection: socket.socket) -> bool:
        """Pass ``connection`` to the worker with the least to do, if that is less than here.

        Returns:
            Whether the other worker has it; then the caller must only close its own descriptor.
        """
        for name, peer in sorted(self._peers.items(), key=lambda item: item[1].load):
            if peer.load >= self.load:
                return False
            try:
                # Python 3.11's socket.send_fds ignores the address.
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [connection.fileno()]))
                self.sock.sendmsg([b"c"], [rights], 0, peer.address)
            except BlockingIOError:  # it does not get to take those that it was given
                return False
            except (ConnectionRefusedError, FileNotFoundError):  # it was killed
                del self._peers[name]
                continue
            except OSError:  # too many descriptors are on their way, for example
                return False
            return True
        return False

    def take(self) -> list[socket.socket]:
        """Connections that others have passed on, some of them; none when there are no more."""
        taken: list[socket.socket] = []
        with contextlib.suppress(BlockingIOError):
            while len(taken) < _AT_ONCE:
                _, descriptors, _, _ = socket.recv_fds(self.sock, 1, 1)
                taken += [socket.socket(fileno=each) for each in descriptors]
        return taken

    def close(self) -> None:
        """Leave; the caller has set ``load`` to ``NEVER`` before, and taken what came."""
        forget_worker(self._folder, int(self._own.name))
        self.sock.close()

    def _open(self, name: str) -> Peer:
        own = self._folder / name
        return Peer(str(own.with_suffix(_SOCKET)), _share(own.with_suffix(_LOAD)))


def forget_worker(folder: Path, pid: int) -> None:
    """Remove the files of a worker that has ended."""
    for suffix in (_SOCKET, _LOAD):
        (folder / str(pid)).with_suffix(suffix).unlink(missing_ok=True)


def _share(path: Path) -> memoryview:
    """Two aligned words in memory that processes share, so each is read and written whole."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(descriptor, 16)
        return memoryview(mmap.mmap(descriptor, 16)).cast("q")
    finally:
        os.close(descriptor)
