"""``Connection``: one client's socket, what it has sent, and what must still be sent to it.

It gives the deadline of the client's next step. It never blocks: a client that sends or reads one
byte a second occupies a connection, but not a thread.
"""

import math
import random
import socket
import time
from enum import Enum
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Any

from service.server.protocol import Limits
from service.server.sockets.request_reader import RECEIVE_BYTES, RawRequest, RequestReader

LINGER_S = 2.0
# After ``Limits.head_s`` of grace, the worker drops a client that sends or reads more slowly.
MIN_BYTES_PER_S = 32 * 1024
# A client that stays below that rate for this long is among the first that the worker disconnects
# when it needs room for others.
SLOW_AFTER_S = 1.0


class ConnectionState(Enum):
    """What a connection is waiting for."""

    IDLE = "the first byte of a request"
    READING = "the rest of a request"
    WORKING = "the application"
    HELD = "its turn to be refused"
    WRITING = "the client to take its answer"
    LINGERING = "the client to have read the last answer"
    CLOSED = "nothing"


class Connection:
    """One client's socket, in non-blocking mode, with what it has received and must still send.

    It has many attributes and methods because a step of a client changes several of them together:
    the bytes, the state, and the time since when it lasts.
    """

    __slots__ = (
        "_moved_at",
        "_old_at",
        "_since",
        "client",
        "ended",
        "keep",
        "limits",
        "origin",
        "reader",
        "sent_bytes",
        "server",
        "sock",
        "state",
        "unsent",
        "watched",
    )

    def __init__(self, sock: socket.socket, client: Any, server: Any, limits: Limits) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.client = client
        self.server = server
        self.limits = limits
        self.origin = _origin(client, limits.trusted_proxies)
        """The address whose connections share one limit; "" if this connection has no limit."""
        self.reader = RequestReader()
        self.unsent: memoryview = memoryview(b"")
        self.sent_bytes = 0
        """Bytes sent of the current answer."""
        self.keep = True
        """Whether the connection stays open for another request after the current answer."""
        # Random, so that connections opened together do not all close together.
        self._old_at = time.monotonic() + limits.age_s * random.uniform(0.75, 1.25)  # noqa: S311
        self.watched = 0
        """The events of its socket that the loop watches, as a mask of ``selectors``."""
        self.ended = False
        """Whether the client has closed its sending side."""
        self.state = ConnectionState.IDLE
        self.rest()

    def rest(self) -> None:
        """Wait for the next request."""
        self._enter(ConnectionState.IDLE)

    def work(self) -> None:
        """The application handles the request now, so the client has no deadline."""
        self._enter(ConnectionState.WORKING)

    def hold(self) -> None:
        """The client waits for its error, which is ready."""
        self._enter(ConnectionState.HELD)

    @property
    def is_held(self) -> bool:
        """Whether the client waits for its error, and the connection was not closed since."""
        return self.state is ConnectionState.HELD

    def linger(self) -> None:
        """Close the sending side, and discard what the client sends for a while.

        Closing at once would reset the connection, and the client could lose the answer.
        """
        self._enter(ConnectionState.LINGERING)
        self.reader.clear()
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket."""
        self._enter(ConnectionState.CLOSED)
        self.sock.close()

    def receive(self) -> int:
        """Receive available bytes from the socket, and return how many.

        Raises:
            BlockingIOError: nothing has arrived.
            OSError: as ``recv`` raises it.
        """
        if self.state is ConnectionState.LINGERING:
            count: int | None = len(self.sock.recv(RECEIVE_BYTES))
        else:
            count = self.reader.receive(self.sock)
        if count:
            self._moved_at = time.monotonic()
        elif count == 0:
            self.ended = True
        return count or 0

    def take(self) -> RawRequest | None:
        """The next request; None until all of it has arrived. Errors as ``RequestReader.take``."""
        raw = self.reader.take(self.limits)
        if raw is None and self.state is ConnectionState.IDLE and self.reader.has_begun:
            self._enter(ConnectionState.READING)
        return raw

    @property
    def deadline(self) -> float:
        """When the client must have completed its next step, in seconds of the monotonic clock.

        A client that sends or reads must keep up ``MIN_BYTES_PER_S``. Only bytes that were really
        transferred count, not the announced length. It must not pause for ``head_s`` either.
        """
        match self.state:
            case ConnectionState.IDLE:
                return self._since + self.limits.keep_alive_s
            case ConnectionState.READING | ConnectionState.WRITING:
                earned_s = self._moved_bytes() / MIN_BYTES_PER_S
                return self.limits.head_s + min(self._since + earned_s, self._moved_at)
            case ConnectionState.LINGERING:
                return self._since + LINGER_S
            case ConnectionState.WORKING | ConnectionState.HELD | ConnectionState.CLOSED:
                return math.inf

    def closing_order(self, now: float) -> tuple[bool, float]:
        """Sort key: the connection that costs least to close comes first.

        First come connections that are too slow or have had their last answer, then all others;
        within each group, the one that has been in its state for longest.
        """
        slow = self.state is ConnectionState.LINGERING
        if self.state in (ConnectionState.READING, ConnectionState.WRITING):
            elapsed_s = now - self._since
            slow = elapsed_s > max(SLOW_AFTER_S, self._moved_bytes() / MIN_BYTES_PER_S)
        return not slow, self._since

    @property
    def is_untouched(self) -> bool:
        """Whether no byte of its next request was read, so that another worker can take it over."""
        return self.state is ConnectionState.IDLE and not self.reader.received and not self.ended

    def send(self) -> bool:
        """Send as much as the socket accepts now; True if nothing is left to send.

        Raises:
            OSError: as ``send`` raises it, for example because the client has reset the connection.
        """
        try:
            sent = self.sock.send(self.unsent)
        except BlockingIOError:
            sent = 0
        self.unsent = self.unsent[sent:]
        if not self.unsent:
            return True
        if self.state is not ConnectionState.WRITING:
            self._enter(ConnectionState.WRITING)
            self.sent_bytes = 0
        elif sent:
            self._moved_at = time.monotonic()
        self.sent_bytes += sent
        return False

    def is_old(self) -> bool:
        """Whether the connection has lasted so long that the client should open a new one."""
        return time.monotonic() > self._old_at

    def has_hung_up(self) -> bool:
        """Whether the client has closed its sending side or reset the connection.

        A client that waited for long and then closed its sending side has most likely left.
        """
        try:
            return self.ended or not self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:  # the client reset the connection
            return True

    def _moved_bytes(self) -> int:
        return self.sent_bytes if self.state is ConnectionState.WRITING else self.reader.size

    def _enter(self, state: ConnectionState) -> None:
        """Begin ``state``; a closed connection stays closed."""
        if self.state is not ConnectionState.CLOSED:
            self.state = state
            self._since = self._moved_at = time.monotonic()


def _origin(client: Any, trusted_proxies: tuple[IPv4Network | IPv6Network, ...]) -> str:
    """The IPv4 address of a socket's peer, or the /64 of its IPv6 address.

    "" if the peer is a trusted proxy or uses a Unix socket: those connections have no limit.
    """
    if not isinstance(client, tuple):
        return ""  # a Unix socket
    address = ip_address(client[0].partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if any(address in network for network in trusted_proxies):
        return ""
    return str(address) if address.version == 4 else f"{int(address) >> 64:x}/64"
