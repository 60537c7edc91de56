"""Moves a connection to a less busy worker when its next request arrives.

Each worker has its own listening socket, and the kernel distributes connections over them at
random. A keep-alive connection stays with its worker, so with a slow model a request could wait
behind others while another worker was idle. Each worker therefore publishes in shared memory how
many requests it has postponed. A busy worker passes a connection whose next request it has not
read yet to a worker with fewer (``SCM_RIGHTS``, unix(7)).
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
"""The load of a worker that takes no connections because it is starting or ending."""

SILENT_S = 1.0
"""A worker whose loop has not turned for so long gets no connections, because it may hang."""

_SOCKET, _LOAD = ".socket", ".load"
_MAX_TAKEN = 32


class Peer(Struct, frozen=True):
    """Another worker: the socket on which it takes connections, and its load.

    ``shared`` has two words: the number of requests that it has postponed, and the time at which
    its loop last turned, in nanoseconds of the monotonic clock.
    """

    address: str
    shared: memoryview

    @property
    def load(self) -> int:
        """The requests that it has postponed; ``NEVER`` if it is starting, ending or silent."""
        is_silent = self.shared[1] < (time.monotonic() - SILENT_S) * 1e9
        return NEVER if is_silent else self.shared[0]


class Handover:
    """Gives connections to other workers of a service, and takes connections from them.

    Not thread-safe: only for the thread of the worker's loop.
    """

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
        # A dead worker with the same process id may have left its socket.
        self._own.with_suffix(_SOCKET).unlink(missing_ok=True)
        self.sock.bind(str(self._own.with_suffix(_SOCKET)))

    @property
    def load(self) -> int:
        """The requests that this worker has postponed; ``NEVER`` while it takes no connections."""
        return self._shared[0]

    @load.setter
    def load(self, value: int) -> None:
        self._shared[0] = value

    def beat(self, now: float) -> None:
        """Tell the other workers that the loop turns; ``now`` is a time of the monotonic clock."""
        self._shared[1] = int(now * 1e9)

    def find_peers(self) -> None:
        """Update the list of other workers from the files in the folder."""
        names = {path.stem for path in self._folder.glob(f"*{_SOCKET}")} - {self._own.stem}
        self._peers = {name: self._peers.get(name) or self._open(name) for name in names}

    def give(self, connection: socket.socket) -> bool:
        """Pass ``connection`` to the least loaded worker, if its load is lower than this one's.

        Returns:
            Whether the other worker has it. If so, the caller must close its own descriptor, and
            nothing else.
        """
        for name, peer in sorted(self._peers.items(), key=lambda item: item[1].load):
            if peer.load >= self.load:
                return False
            try:
                # Python 3.11's socket.send_fds ignores the address.
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [connection.fileno()]))
                self.sock.sendmsg([b"c"], [rights], 0, peer.address)
            except BlockingIOError:  # it has not yet taken the connections that it was given
                return False
            except (ConnectionRefusedError, FileNotFoundError):  # the worker was killed
                del self._peers[name]
                continue
            except OSError:  # for example, too many descriptors are in transit
                return False
            return True
        return False

    def take(self) -> list[socket.socket]:
        """At most ``_MAX_TAKEN`` connections from other workers; an empty list if none waits."""
        taken: list[socket.socket] = []
        with contextlib.suppress(BlockingIOError):
            while len(taken) < _MAX_TAKEN:
                _, descriptors, _, _ = socket.recv_fds(self.sock, 1, 1)
                taken += [socket.socket(fileno=each) for each in descriptors]
        return taken

    def close(self) -> None:
        """Leave the group of workers.

        Before this call, set ``load`` to ``NEVER`` and ``take`` the connections that still come.
        """
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
    """Two words of memory that processes share.

    They are aligned, so the processor reads and writes each of them in one piece.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(descriptor, 16)
        return memoryview(mmap.mmap(descriptor, 16)).cast("q")
    finally:
        os.close(descriptor)
