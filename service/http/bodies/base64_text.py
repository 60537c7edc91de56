"""Decodes base64 in JSON: checks lengths first, and lets one thread at a time do long work."""

import contextlib
import time
from mmap import mmap
from threading import Lock

import msgspec
import pybase64

from service.http.bodies.reading import too_large

LARGE_JSON_BYTES = 256 * 1024
MAX_DATA_URL_HEAD = 256
# From the URL-safe alphabet (RFC 4648, section 5) to the standard one (section 4).
_STANDARD_BASE64 = bytes.maketrans(b"-_", b"+/")


class _OneAtATime:
    """A context manager that admits one thread at a time, with pauses.

    A thread that had to wait sleeps for as long as the thread before it worked. Decoding JSON and
    base64 holds the interpreter. While eight clients posted 4 MB each, other clients waited for
    0.9 s if all bodies were decoded at once, and for 64 ms if one after the other without pauses.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._began = self._worked_s = 0.0

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._lock.acquire()
            time.sleep(self._worked_s)
        self._began = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._worked_s = time.perf_counter() - self._began
        self._lock.release()


_one_large = _OneAtATime()


def paced(size: int) -> contextlib.AbstractContextManager[None]:
    """The context for decoding ``size`` bytes of JSON or base64; small ones never wait."""
    return _one_large if size > LARGE_JSON_BYTES else contextlib.nullcontext()


def count(body: bytes | mmap, character: bytes, limit: int) -> int:
    """How often ``character`` occurs in ``body``, counted up to ``limit``: each costs a search."""
    found, at = 0, body.find(character, 0)
    while at >= 0 and found < limit:
        found, at = found + 1, body.find(character, at + 1)
    return found


def first_byte(value: msgspec.Raw) -> bytes:
    """The first byte of a JSON value, which determines its type."""
    return bytes(memoryview(value)[:1])


def characters(text: msgspec.Raw, has_escapes: bool) -> memoryview:
    """The characters of a JSON string; raises ``ValueError`` if one is not ASCII."""
    view = memoryview(text)
    if has_escapes:
        return memoryview(msgspec.json.decode(view, type=str).encode("ascii"))
    return view[1:-1]


def from_base64(text: memoryview, limit: int) -> bytes:
    """Decode ``text``: base64 of RFC 4648 or MIME, padded or not, or a data URL.

    Raises:
        ImageTooLarge: the result would have more than ``limit`` bytes; raised before decoding.
        ValueError: the text is not base64.
    """
    head = bytes(text[:MAX_DATA_URL_HEAD])
    if head[:5].lower() == b"data:":
        head = head.partition(b",")[0]
        if not head.endswith(b";base64"):
            start = head[:40].decode(errors="replace")
            raise ValueError(f"the data URL begins with {start!r}, not with 'data:…;base64,'")
        text = text[len(head) + 1 :]
    if text.nbytes // 4 * 3 - 2 <= limit:
        with contextlib.suppress(ValueError):  # it may be URL-safe, unpadded or have line ends
            return pybase64.b64decode(text, validate=True)
    data = bytes(text).translate(_STANDARD_BASE64, b" \t\r\n").rstrip(b"=")
    size = len(data) * 3 // 4
    if size > limit:
        raise too_large(size, limit)
    return pybase64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
