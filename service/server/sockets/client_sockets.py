"""``ClientSockets``: every socket of one worker, and which of them can be read or written.

It accepts clients, finds out who has sent something, sends answers as fast as clients take them,
and closes connections when there are too many. It does not read requests.
"""

import errno
import logging
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from heapq import nsmallest
from typing import Any

from service.server.protocol import Limits
from service.server.sockets.connection import Connection, ConnectionState

# One call accepts at most this many clients, and at most this many late ones are closed at once.
BATCH_CLIENTS = 64
# If a worker has no room for another connection, it closes this share of its connections.
ROOM_SHARE = 1 / 128
_NO_DESCRIPTOR_OR_MEMORY = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class ClientSockets:
    """The open connections, at most ``max_connections`` and ``max_per_origin`` of one address.

    It has many methods because each of them keeps the poller, the counts and the order of readable
    connections in step.
    """

    def __init__(
        self, limits: Limits, max_connections: int, max_per_origin: int, log: logging.Logger
    ) -> None:
        self._limits = limits
        self._max_connections = max_connections
        self._max_per_origin = max_per_origin
        self._log = log
        self._poller = selectors.DefaultSelector()
        self._count_by_origin: Counter[str] = Counter()
        self.connections: dict[Connection, None] = {}
        self.readable: dict[Connection, float] = {}
        """Since when each can be read. The order is kept: a connection that this round does not
        reach comes first in the next one."""

    def call_on_input(self, source: Any, callback: Callable[[Any], object]) -> None:
        """Have ``poll`` call ``callback`` with ``source``, a file or socket, if it can be read."""
        self._poller.register(source, selectors.EVENT_READ, callback)

    def ignore(self, source: Any) -> None:
        """End what ``call_on_input`` began."""
        self._poller.unregister(source)

    def poll(self, timeout_s: float) -> None:
        """Handle what has happened, or the first events within ``timeout_s``."""
        for key, _ in self._poller.select(timeout_s):
            key.data(key.fileobj)

    def accept(self, listener: socket.socket) -> bool:
        """Accept up to ``BATCH_CLIENTS`` waiting clients; True if more may wait.

        With one a round, the last of several hundred clients would wait for seconds.
        """
        for _ in range(BATCH_CLIENTS):
            try:
                client, _ = listener.accept()
            except OSError as error:
                if error.errno in _NO_DESCRIPTOR_OR_MEMORY:
                    self._make_room()
                elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                    self._log.warning("cannot accept a connection: %s", error)
                return False
            self._open(client)
        return True

    def adopt(self, clients: Iterable[socket.socket]) -> None:
        """Add clients whose request has arrived and was not read."""
        for client in clients:
            if connection := self._open(client):
                self.readable[connection] = time.monotonic()

    def late(self, now: float) -> list[Connection]:
        """Connections whose deadline has passed, at most ``BATCH_CLIENTS``.

        Many clients that connected together would otherwise block the loop together.
        """
        late = [c for c in self.connections if c.deadline <= now and c not in self.readable]
        return late[:BATCH_CLIENTS]

    def close_idle(self) -> None:
        """Close all connections whose next request has not begun to arrive."""
        self.poll(0)  # a client whose request has just arrived is not idle
        idle = [c for c in self.connections if c.state is ConnectionState.IDLE]
        for each in [c for c in idle if c not in self.readable]:
            self.close(each)

    def send(self, connection: Connection, data: bytes) -> None:
        """Send an answer; afterwards the connection waits for its next request, or ends."""
        connection.unsent = memoryview(data)
        self._write(connection)

    def pause(self, connection: Connection) -> None:
        """Ignore what the client sends until its answer is sent."""
        self._watch(connection, 0)
        self.readable.pop(connection, None)

    def close(self, connection: Connection) -> None:
        """Close ``connection``, unless it is closed."""
        if connection.state is ConnectionState.CLOSED:
            return  # an earlier event of this poll closed it to make room
        self.pause(connection)
        del self.connections[connection]
        if origin := connection.origin:
            self._count_by_origin[origin] -= 1
            if not self._count_by_origin[origin]:
                del self._count_by_origin[origin]
        connection.close()

    def _open(self, client: socket.socket) -> Connection | None:
        """Add a client's connection.

        Returns:
            None if the connection was closed again: the client has left, its address has too many
            connections, or the kernel has no memory to watch another socket.
        """
        if len(self.connections) >= self._max_connections:
            self._make_room()
        try:
            names = client.getpeername(), client.getsockname()
            connection = Connection(client, *names, self._limits)
            self._watch(connection, selectors.EVENT_READ)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.ECONNRESET):
                self._log.warning("cannot accept a connection: %s", error)
            client.close()
            return None
        self.connections[connection] = None
        if origin := connection.origin:
            self._count_by_origin[origin] += 1
            if self._count_by_origin[origin] > self._max_per_origin:
                self._make_room(origin)
        return None if connection.state is ConnectionState.CLOSED else connection

    def _make_room(self, origin: str | None = None) -> None:
        """Close a few connections, only of ``origin`` if given, to free file descriptors.

        It closes connections of slow clients first, then those that have been in their state for
        longest; connections with an unread request come after all others. A connection whose
        request is being answered stays open. Sorting 1,000 connections takes 1.6 ms. If this closed
        one at a time, a client that connects 700 times a second would use up the loop's time.
        """
        now = time.monotonic()
        answering = (ConnectionState.WORKING, ConnectionState.HELD)
        closable = [
            each
            for each in self.connections
            if each.state not in answering and origin in (None, each.origin)
        ]
        by_loss = lambda each: (each in self.readable, *each.closing_order(now))  # noqa: E731
        room = max(1, int(ROOM_SHARE * (self._max_per_origin if origin else self._max_connections)))
        for connection in nsmallest(room, closable, key=by_loss):
            self.close(connection)
        if not closable:
            held = [c for c in self.connections if c.state is ConnectionState.HELD]
            if held:  # the one that has waited for its error for longest
                self.close(min(held, key=lambda each: each.closing_order(now)))

    def _write(self, connection: Connection) -> None:
        """Send as much as the client takes now; after the last byte, wait for its next request."""
        try:
            if not connection.send():
                self._watch(connection, selectors.EVENT_WRITE)
            elif connection.keep:
                connection.rest()
                self._watch(connection, selectors.EVENT_READ)
                if connection.reader.received or connection.ended:
                    self.readable[connection] = time.monotonic()
            else:
                connection.linger()
                self._watch(connection, selectors.EVENT_READ)
        except OSError:
            self.close(connection)

    def _on_event(self, connection: Connection) -> None:
        match connection.state:
            case ConnectionState.WRITING:
                self._write(connection)
            case ConnectionState.WORKING | ConnectionState.CLOSED:
                pass  # its answer is sent before its next request is read
            case _:
                self.readable.setdefault(connection, time.monotonic())

    def _watch(self, connection: Connection, events: int) -> None:
        """Set the events of ``connection`` that ``poll`` reports; 0 for none."""
        if connection.watched == events:
            return
        if not events:
            self._poller.unregister(connection.sock)
        else:
            change = self._poller.modify if connection.watched else self._poller.register
            change(connection.sock, events, lambda sock: self._on_event(connection))
        connection.watched = events
