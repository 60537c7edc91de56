"""``Connection``: one client's unanswered request bytes, and the answer bytes not yet sent.

It splits the received bytes into complete requests, and gives the deadline of the client's next
step. It never blocks: a client that sends or reads one byte a second occupies a connection, but
not a thread. It knows where a request ends, and nothing else about HTTP or the application.
"""

import math
import random
import re
import socket
import time
from contextlib import suppress
from enum import Enum
from functools import lru_cache
from io import BytesIO
from ipaddress import IPv4Network, IPv6Network, ip_address
from mmap import MADV_NOHUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any

from msgspec import Struct

from service.server.protocol import Limits

HEADERS_END = b"\r\n\r\n"
RECEIVE_BYTES = 64 * 1024
# A longer body gets memory pages of its own, which the kernel takes back when the body is freed.
# On the heap, eight bodies of 4 MB left 100 to 200 MB allocated after they were freed.
MAPPED_BODY_BYTES = 256 * 1024
RECEIVE_LARGE_BYTES = 256 * 1024
MAX_HEAD_BYTES = 32 * 1024
LINGER_S = 2.0
# After ``Limits.head_s`` of grace, the worker drops a client that sends or reads more slowly.
MIN_BYTES_PER_S = 32 * 1024
# A client that stays below that rate for this long is among the first that the worker disconnects
# when it needs room for others.
SLOW_AFTER_S = 1.0
# Longer heads are rare and are not cached, because a cache of them would hold megabytes.
MAX_CACHED_HEAD_BYTES = 1024

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*(?=\r\n)", re.IGNORECASE)
_ANY_LENGTH = re.compile(rb"[\r\n][ \t]*content[-_]length", re.IGNORECASE)
_CODED = re.compile(rb"[\r\n][ \t]*transfer[-_]encoding", re.IGNORECASE)
_JSON = re.compile(rb"\r\ncontent-type:[ \t]*application/json", re.IGNORECASE)
_EXPECT = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*(?=\r\n)", re.IGNORECASE)


class ConnectionState(Enum):
    """What a connection is waiting for."""

    IDLE = "the first byte of a request"
    READING = "the rest of a request"
    WORKING = "the application"
    WRITING = "the client to take its answer"
    LINGERING = "the client to have read the last answer"


class HeadTooLong(Exception):
    """The head of a request does not end within ``MAX_HEAD_BYTES``."""


class RawRequest(Struct, frozen=True):
    """One request: its head and its body.

    ``digits`` are the digits of its Content-Length. ``likeness`` is its head without them: a client
    usually sends the same ``likeness`` again and again. ``complete`` is False if the body was not
    read because it is too long or of unknown length. Then the start of the next request is unknown,
    so no further request may be read from its connection.
    """

    head: bytes
    likeness: bytes
    digits: str | None
    body: bytes | mmap
    complete: bool

    def open_body(self) -> BytesIO | mmap:
        """The body as a file at its beginning."""
        if isinstance(self.body, bytes):
            return BytesIO(self.body)
        self.body.seek(0)
        return self.body

    @property
    def is_upload(self) -> bool:
        """Whether the method is POST or PUT, with which clients send images."""
        return self.head.startswith((b"POST ", b"PUT "))


class Connection:
    """One client's socket, in non-blocking mode, with what it has received and must still send."""

    __slots__ = (
        "_digits",
        "_expects",
        "_filled",
        "_head",
        "_large",
        "_length",
        "_likeness",
        "_moved_at",
        "_old_at",
        "_since",
        "client",
        "ended",
        "keep",
        "limits",
        "origin",
        "received",
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
        self.received = bytearray()
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
        self._large: mmap | None = None
        self._filled = 0
        self._head: bytes | None = None
        self._likeness = b""
        self._digits: str | None = None
        self._length: int | None = None
        self._expects = False
        self.rest()

    def rest(self) -> None:
        """Wait for the next request."""
        self._enter(ConnectionState.IDLE)

    def work(self) -> None:
        """The application handles the request now, so the client has no deadline."""
        self._enter(ConnectionState.WORKING)

    def linger(self) -> None:
        """Close the sending side, and discard what the client sends for a while.

        Closing at once would reset the connection, and the client could lose the answer.
        """
        self._enter(ConnectionState.LINGERING)
        self.forget()
        self.sock.shutdown(socket.SHUT_WR)

    def forget(self) -> None:
        """Discard the received bytes."""
        self.received, self._large, self._filled = bytearray(), None, 0

    @property
    def received_bytes(self) -> int:
        """Bytes held of the arriving request and of the requests that the client sent after it."""
        return len(self.received) + self._filled

    def receive(self) -> int:
        """Receive available bytes from the socket, and return how many.

        Raises:
            BlockingIOError: nothing has arrived.
            OSError: as ``recv`` raises it.
        """
        if self._head is None and len(self.received) >= MAX_HEAD_BYTES:
            return 0  # pipelined requests wait in the kernel's buffer, not in this process
        if self._large is not None:
            end = self._filled + RECEIVE_LARGE_BYTES
            with memoryview(self._large) as pages, pages[self._filled : end] as free:
                count = self.sock.recv_into(free)
            self._filled += count
        else:
            data = self.sock.recv(RECEIVE_BYTES)
            count = len(data)
            if self.state is not ConnectionState.LINGERING:
                self.received += data
        if count:
            self._moved_at = time.monotonic()
        else:
            self.ended = True
        return count

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
            case ConnectionState.WORKING:
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

    def _moved_bytes(self) -> int:
        return self.sent_bytes if self.state is ConnectionState.WRITING else self.received_bytes

    def _enter(self, state: ConnectionState) -> None:
        self.state = state
        self._since = self._moved_at = time.monotonic()

    def take(self) -> RawRequest | None:
        """The next request; None until all of it has arrived.

        Raises:
            HeadTooLong: ``MAX_HEAD_BYTES`` have arrived without the end of a head.
            OSError: there is no memory for the body.
        """
        raw = self._take_body() if self._head is not None or self._take_head() else None
        has_begun = self._head is not None or self.received
        if raw is None and has_begun and self.state is ConnectionState.IDLE:
            self._enter(ConnectionState.READING)
        return raw

    def _take_body(self) -> RawRequest | None:
        """The request whose head has been taken; None until its body has arrived."""
        body: bytes | mmap
        if self._large is not None:
            if self._filled < len(self._large):
                return None
            body, self._large, self._filled = self._large, None, 0
        else:
            length = self._length or 0
            if len(self.received) < length:
                return None
            if len(self.received) == length:
                body, self.received = bytes(self.received), bytearray()
            else:
                body = bytes(self.received[:length])
                del self.received[:length]
        assert self._head is not None
        complete = self._length is not None
        raw = RawRequest(self._head, self._likeness, self._digits, body, complete)
        self._head = None
        self._expects = False
        return raw

    def _take_head(self) -> bool:
        """Move the head of the next request out of ``received``; False if it is incomplete."""
        received = self.received
        end = received.find(HEADERS_END, 0, MAX_HEAD_BYTES)
        if end < 0:
            if len(received) >= MAX_HEAD_BYTES:
                raise HeadTooLong
            return False
        self._head = bytes(received[:end])
        del received[: end + len(HEADERS_END)]
        if b"100-continue" in self._head.lower():
            self._head, found = _EXPECT.subn(b"", self._head + b"\r\n")
            self._head, self._expects = self._head[:-2], found > 0
        self._likeness, self._digits, length = measure(self._head)
        too_long = length is not None and self._is_too_long(length, self._head)
        self._length = None if too_long else length
        if self._length and self._length > max(MAPPED_BODY_BYTES, len(received)):
            self._large = _pages(self._length)
            self._filled = self._large.write(received)
            received.clear()
        return True

    @property
    def is_untouched(self) -> bool:
        """Whether no byte of its next request was read, so that another worker can take it over."""
        return self.state is ConnectionState.IDLE and not self.received and not self.ended

    def expects(self) -> bool:
        """Whether the client waits for "100 Continue"; True only once per request."""
        expects, self._expects = self._expects, False
        return expects

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

    def _is_too_long(self, length: int, head: bytes) -> bool:
        limits = self.limits
        if length > limits.max_json_bytes and _JSON.search(head):
            return True
        return length > limits.max_body_bytes


def _pages(size: int) -> mmap:
    """Private memory of ``size`` bytes; only pages that are written to take up memory."""
    pages = mmap(-1, size, MAP_PRIVATE | MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(MADV_NOHUGEPAGE)  # otherwise one byte of a body could take 2 MB
    return pages


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


def measure(head: bytes) -> tuple[bytes, str | None, int | None]:
    """``head`` without the digits of its Content-Length, those digits, and the body's length.

    The length is 0 if ``head`` announces no body. It is None if ``head`` announces a body in any
    other form than one plain Content-Length: a proxy and this worker could then disagree about
    where the next request begins.
    """
    found = _LENGTH.search(head + b"\r\n")
    if found is None:
        return head, None, 0 if _lengths(head) == 0 else None
    likeness = head[: found.start(1)] + head[found.end(1) :]
    digits = found[1].decode()
    return likeness, digits, int(digits) if _lengths(likeness) == 1 else None


def _lengths(head: bytes) -> int:
    """How many Content-Length headers ``head`` has; 2 if it has a Transfer-Encoding."""
    short = len(head) <= MAX_CACHED_HEAD_BYTES
    return _count_lengths(head) if short else _count_lengths.__wrapped__(head)


@lru_cache(1024)
def _count_lengths(head: bytes) -> int:
    return 2 if _CODED.search(head) else len(_ANY_LENGTH.findall(head))
