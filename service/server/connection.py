"""``Connection``: what one client has sent and is not answered yet, and what it was not sent yet.

Splits bytes into whole requests, and says until when the next step must be done. Never waits: a
client that sends, or reads, a byte a second holds a connection and nothing else. Knows no HTTP
beyond where a request ends, and no application.
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
# A longer body gets pages of its own, which go back to the machine with it: a heap that grows by
# pieces of megabytes, and frees them, kept 100 to 200 MB for eight bodies of 4 MB.
MAPPED_BODY_BYTES = 256 * 1024
RECEIVE_LARGE_BYTES = 256 * 1024
MAX_HEAD_BYTES = 32 * 1024
LINGER_S = 2.0
# After ``Limits.head_s`` of grace, a client that sends or reads more slowly is given up.
MIN_BYTES_PER_S = 32 * 1024
# A client that is below that rate for so long is among the first to be closed for others.
SLOW_AFTER_S = 1.0
# Longer heads are rare, and not remembered: a cache of them would hold megabytes.
MAX_CACHED_HEAD_BYTES = 1024

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*(?=\r\n)", re.IGNORECASE)
_ANY_LENGTH = re.compile(rb"[\r\n][ \t]*content[-_]length", re.IGNORECASE)
_CODED = re.compile(rb"[\r\n][ \t]*transfer[-_]encoding", re.IGNORECASE)
_JSON = re.compile(rb"\r\ncontent-type:[ \t]*application/json", re.IGNORECASE)
_EXPECT = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*(?=\r\n)", re.IGNORECASE)


class ConnectionState(Enum):
    """What a connection waits for."""

    IDLE = "the first byte of a request"
    READING = "the rest of a request"
    WORKING = "the application"
    WRITING = "the client to take its answer"
    LINGERING = "the client to have read the last answer"


class HeadTooLong(Exception):
    """The head of a request does not end."""


class RawRequest(Struct, frozen=True):
    """One whole request.

    ``likeness`` is its head without the digits of its length, which are ``digits``: a client sends
    the same one again and again. ``complete`` is False where the body was not read, because it is
    too long or of unknown length: then no later request may be looked for on its connection.
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
        return self.head.startswith((b"POST ", b"PUT "))


class Connection:
    """One client's socket, which never blocks."""

    __slots__ = (
        "_digits",
        "_expects",
        "_filled",
        "_head",
        "_large",
        "_length",
        "_likeness",
        "_moved_at",
        "_old",
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
        """The address whose connections are limited together; "" where there is no limit."""
        self.received = bytearray()
        self.unsent: memoryview = memoryview(b"")
        self.sent_bytes = 0
        """Of the answer that is being sent."""
        self.keep = True
        """Whether the client is listened to after the answer that is being sent."""
        # Not all at the same moment that were opened at the same moment.
        self._old = time.monotonic() + limits.age_s * random.uniform(0.75, 1.25)  # noqa: S311
        self.watched = 0
        """The events of its socket that the loop is told of."""
        self.ended = False
        """Whether the client has said that it will send no more."""
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
        """The application has the request; how long that takes is not the client's fault."""
        self._enter(ConnectionState.WORKING)

    def linger(self) -> None:
        """Say no more; read on for a while, as closing at once would take the answer back."""
        self._enter(ConnectionState.LINGERING)
        self.forget()
        self.sock.shutdown(socket.SHUT_WR)

    def forget(self) -> None:
        """Drop what has been received."""
        self.received, self._large, self._filled = bytearray(), None, 0

    @property
    def received_bytes(self) -> int:
        """Of the request that arrives, and of what was sent behind it."""
        return len(self.received) + self._filled

    def receive(self) -> int:
        """Take what has arrived; how many bytes that were.

        Raises as ``recv`` does, also when there is nothing.
        """
        if self._head is None and len(self.received) >= MAX_HEAD_BYTES:
            return 0  # requests behind each other wait in the kernel, not here
        if self._large is not None:
            end = self._filled + RECEIVE_LARGE_BYTES
            with memoryview(self._large) as whole, whole[self._filled : end] as free:
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
        """When the client's time for the next step is over, on the monotonic clock.

        A client that sends or reads must keep to ``MIN_BYTES_PER_S``, by the bytes that it has
        moved and not by those that it has announced; and it must not pause for ``head_s``.
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
        """Sorts connections by how little is lost when they are closed to make room.

        Clients that are too slow come first, or have had their last answer; then the idle ones,
        for as long as they are that.
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
        """The next request, once all of it has arrived.

        Raises:
            HeadTooLong: it is none, or not one for us.
            OSError: the machine has no memory for its body.
        """
        asked = self._take_whole() if self._head is not None or self._take_head() else None
        has_begun = self._head is not None or self.received
        if asked is None and has_begun and self.state is ConnectionState.IDLE:
            self._enter(ConnectionState.READING)
        return asked

    def _take_whole(self) -> RawRequest | None:
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
        asked = RawRequest(self._head, self._likeness, self._digits, body, complete)
        self._head = None
        self._expects = False
        return asked

    def _take_head(self) -> bool:
        """Whether the head of the next request has arrived; it is taken out of ``received``."""
        received = self.received
        end = received.find(HEADERS_END, 0, MAX_HEAD_BYTES)
        if end < 0:
            if len(received) >= MAX_HEAD_BYTES:
                raise HeadTooLong
            return False
        self._head = bytes(received[:end])
        del received[: end + len(HEADERS_END)]
        if b"100-continue" in self._head.lower():
            self._head, said = _EXPECT.subn(b"", self._head + b"\r\n")
            self._head, self._expects = self._head[:-2], said > 0
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
        """Whether nothing of its next request was read yet, so that another worker may read it."""
        return self.state is ConnectionState.IDLE and not self.received and not self.ended

    def expects(self) -> bool:
        """Whether the client waits to be told to send the body; said once."""
        expects, self._expects = self._expects, False
        return expects

    def send(self) -> bool:
        """Send what the client takes now; whether that was all. Raises as ``send`` does."""
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
        """Whether the client should connect anew."""
        return time.monotonic() > self._old

    def has_hung_up(self) -> bool:
        """Whether the client sends no more: then, after a wait, it has most likely gone."""
        try:
            return self.ended or not self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:  # it was reset
            return True

    def _is_too_long(self, length: int, head: bytes) -> bool:
        limits = self.limits
        if length > limits.max_json_bytes and _JSON.search(head):
            return True
        return length > limits.max_body_bytes


def _pages(size: int) -> mmap:
    """Private memory of ``size`` bytes, which takes room only where something was written."""
    pages = mmap(-1, size, MAP_PRIVATE | MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(MADV_NOHUGEPAGE)  # else one byte of a body could take 2 MB
    return pages


def _origin(client: Any, trusted_proxies: tuple[IPv4Network | IPv6Network, ...]) -> str:
    """The IPv4 address of a socket's peer, or the /64 of its IPv6 address."""
    if not isinstance(client, tuple):
        return ""  # a Unix socket's
    address = ip_address(client[0].partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if any(address in network for network in trusted_proxies):
        return ""
    return str(address) if address.version == 4 else f"{int(address) >> 64:x}/64"


def measure(head: bytes) -> tuple[bytes, str | None, int | None]:
    """``head`` without the digits of its length, those, and how many bytes follow it.

    None where that is not said in the one plain form: in any other, two readers could differ about
    where the next request begins.
    """
    found = _LENGTH.search(head + b"\r\n")
    if found is None:
        return head, None, 0 if _lengths(head) == 0 else None
    likeness = head[: found.start(1)] + head[found.end(1) :]
    digits = found[1].decode()
    return likeness, digits, int(digits) if _lengths(likeness) == 1 else None


def _lengths(head: bytes) -> int:
    """How often ``head`` says how long the body is; 2 where it says so in another way."""
    short = len(head) <= MAX_CACHED_HEAD_BYTES
    return _count_lengths(head) if short else _count_lengths.__wrapped__(head)


@lru_cache(1024)
def _count_lengths(head: bytes) -> int:
    return 2 if _CODED.search(head) else len(_ANY_LENGTH.findall(head))
