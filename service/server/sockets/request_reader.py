"""``RequestReader``: splits the bytes that one client has sent into complete requests.

It knows where a request ends, and nothing else about HTTP or the application.
"""

import re
import socket
from contextlib import suppress
from functools import lru_cache
from io import BytesIO
from mmap import MADV_NOHUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap

from msgspec import Struct

from service.server.protocol import Limits

HEADERS_END = b"\r\n\r\n"
RECEIVE_BYTES = 64 * 1024
# A longer body gets memory pages of its own, which the kernel takes back when the body is freed.
# On the heap, eight bodies of 4 MB left 100 to 200 MB allocated after they were freed.
MAPPED_BODY_BYTES = 256 * 1024
RECEIVE_LARGE_BYTES = 256 * 1024
MAX_HEAD_BYTES = 32 * 1024
# Longer heads are rare and are not cached, because a cache of them would hold megabytes.
MAX_CACHED_HEAD_BYTES = 1024

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*(?=\r\n)", re.IGNORECASE)
_ANY_LENGTH = re.compile(rb"[\r\n][ \t]*content[-_]length", re.IGNORECASE)
_CODED = re.compile(rb"[\r\n][ \t]*transfer[-_]encoding", re.IGNORECASE)
_JSON = re.compile(rb"\r\ncontent-type:[ \t]*application/json", re.IGNORECASE)
_EXPECT = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*(?=\r\n)", re.IGNORECASE)


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


class RequestReader:
    """The received bytes of one client, and how far its next request has arrived."""

    __slots__ = (
        "_digits",
        "_expects",
        "_filled",
        "_head",
        "_large",
        "_length",
        "_likeness",
        "received",
    )

    def __init__(self) -> None:
        self._head: bytes | None = None
        self._likeness = b""
        self._digits: str | None = None
        self._length: int | None = None
        self._expects = False
        self.clear()

    def clear(self) -> None:
        """Discard the received bytes."""
        self.received = bytearray()
        """Bytes of the next head, of a small body, and of the requests sent after it."""
        self._large: mmap | None = None
        self._filled = 0

    @property
    def size(self) -> int:
        """Bytes held of the arriving request and of the requests that the client sent after it."""
        return len(self.received) + self._filled

    @property
    def has_begun(self) -> bool:
        """Whether a part of a request has arrived."""
        return self._head is not None or bool(self.received)

    def receive(self, sock: socket.socket) -> int | None:
        """Receive available bytes, and return how many.

        Returns:
            None if nothing was read because enough pipelined requests have arrived. Further ones
            wait in the kernel's buffer, not in this process.

        Raises:
            OSError: as ``recv`` raises it.
        """
        if self._head is None and len(self.received) >= MAX_HEAD_BYTES:
            return None
        if self._large is None:
            data = sock.recv(RECEIVE_BYTES)
            self.received += data
            return len(data)
        end = self._filled + RECEIVE_LARGE_BYTES
        with memoryview(self._large) as pages, pages[self._filled : end] as free:
            count = sock.recv_into(free)
        self._filled += count
        return count

    def take(self, limits: Limits) -> RawRequest | None:
        """The next request; None until all of it has arrived.

        Raises:
            HeadTooLong: ``MAX_HEAD_BYTES`` have arrived without the end of a head.
            OSError: there is no memory for the body.
        """
        return self._take_body() if self._head is not None or self._take_head(limits) else None

    def expects(self) -> bool:
        """Whether the client waits for "100 Continue"; True only once per request."""
        expects, self._expects = self._expects, False
        return expects

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

    def _take_head(self, limits: Limits) -> bool:
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
        too_long = length is not None and _is_too_long(length, self._head, limits)
        self._length = None if too_long else length
        if self._length and self._length > max(MAPPED_BODY_BYTES, len(received)):
            self._large = _pages(self._length)
            self._filled = self._large.write(received)
            received.clear()
        return True


def _is_too_long(length: int, head: bytes, limits: Limits) -> bool:
    if length > limits.max_json_bytes and _JSON.search(head):
        return True
    return length > limits.max_body_bytes


def _pages(size: int) -> mmap:
    """Private memory of ``size`` bytes; only pages that are written to take up memory."""
    pages = mmap(-1, size, MAP_PRIVATE | MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(MADV_NOHUGEPAGE)  # otherwise one byte of a body could take 2 MB
    return pages


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
