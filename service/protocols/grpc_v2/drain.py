"""Ends a gRPC server without failing a call that a client has sent.

``grpc.Server.stop`` cancels the calls that have arrived and that no thread has taken yet: some
clients saw ``CANCELLED`` in each of three shutdowns under load. So the server first stops
listening, and waits until its connections have ended. Each connection ends at its maximum age
(``grpc.max_connection_age_ms``), which fails no call. grpcio has no function for either, so this
module finds the server's sockets in /proc (Linux).
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from service.server.sockets.graceful_close import RECONCILE_TIMEOUT_S, reject_new_connections

POLL_INTERVAL_S = 0.05
# States of a TCP socket in /proc/net/tcp (Linux's include/net/tcp_states.h).
_ESTABLISHED, _LISTEN = "01", "0A"


def drain(port: int, timeout_s: float) -> None:
    """Stop listening on ``port``, and wait until the connections to it have ended.

    Args:
        port: a port of this process; other processes may listen on it, too.
        timeout_s: the longest wait.
    """
    ends = time.monotonic() + timeout_s
    for listener in _listeners(port):
        with listener:
            reject_new_connections(listener)
            time.sleep(RECONCILE_TIMEOUT_S)  # gRPC accepts clients that were connecting
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
    while time.monotonic() < ends and _inodes(port, _ESTABLISHED) & _own().keys():
        time.sleep(POLL_INTERVAL_S)


def _listeners(port: int) -> Iterator[socket.socket]:
    """This process's sockets that listen on ``port``, each as a duplicate."""
    own = _own()
    for inode in _inodes(port, _LISTEN) & own.keys():
        with contextlib.suppress(OSError):
            yield socket.socket(fileno=os.dup(own[inode]))


def _inodes(port: int, state: str) -> set[str]:
    """The inodes of all processes' sockets with that local port and state."""
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == state and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[9])
    return found


def _own() -> dict[str, int]:
    """This process's sockets: inode → file descriptor."""
    found = {}
    with contextlib.suppress(OSError):
        for each in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(each.readlink())
                if target.startswith("socket:["):
                    found[target[len("socket:[") : -1]] = int(each.name)
    return found
