"""Reads the images out of a request's body: raw bytes, a multipart form, or JSON with base64."""

import contextlib
import re
import time
from collections.abc import Iterator
from mmap import mmap
from threading import Lock
from typing import TYPE_CHECKING

import msgspec
import pybase64
from msgspec import Struct
from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser
from werkzeug.exceptions import abort

from registry.core.errors import ConvoyError, ImageTooLarge, InvalidImage, UnsupportedEncoding
from service.server.protocol import IN_LOOP, Postpone
from service.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import InputStream, WSGIEnvironment

CHUNK_BYTES = 64 * 1024
# The strict parser accepts bytes after the last boundary only in the chunk with that boundary.
EPILOGUE_BYTES = 4 * 1024
# The time that parsing a form may take in a worker's loop.
LOOP_PARSE_S = 0.01
# Limits for parts of a form that are not images, and for all bytes of a form outside of images.
MAX_OTHER_PARTS = 8
MAX_OTHER_BYTES = 256 * 1024
MAX_PART_HEADER_BYTES = 1024
MAX_DATA_URL_HEAD = 256
LARGE_JSON_BYTES = 256 * 1024
# JSON encoders escape "/", which is 1 in 64 characters of base64, perhaps "+", and line ends.
MIN_BYTES_PER_ESCAPE = 8
MAX_FREE_ESCAPES = 1024
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LENGTH = re.compile(r"[0-9]{1,15}")

# By default, curl --data-binary sends x-www-form-urlencoded, and S3 sends binary/octet-stream.
_RAW = {
    "",
    "application/octet-stream",
    "application/x-www-form-urlencoded",
    "binary/octet-stream",
}
_FORMS = {"multipart/form-data", "application/json"}
# RFC 2045 requires quotes around some characters that some clients send unquoted.
_BOUNDARY = re.compile(r";\s*boundary=(?:\"([^\"]{1,200})\"|([^;\"\s]{1,200}))", re.IGNORECASE)
IMAGE_NAME = re.compile(r"(?:image|file)s?(?:\[[0-9]*\])?", re.ASCII)
# From the URL-safe alphabet (RFC 4648, section 5) to the standard one (section 4).
_STANDARD_BASE64 = bytes.maketrans(b"-_", b"+/")


class JsonBody(Struct, forbid_unknown_fields=True):
    """``{"image": "<base64>"}`` or ``{"images": ["<base64>", …]}``.

    The strings are slices of the body, still quoted and escaped: a copy of 4 MB would take 10 ms.
    """

    image: msgspec.Raw = msgspec.Raw(b"null")
    images: list[msgspec.Raw] | None = None


class BodyImages:
    """The encoded images of a body, in their order.

    Iteration yields the bytes of each image, or the error that made it unreadable.

    Raises:
        HTTPException: the body as a whole cannot be read (400, 411, 413 or 415).
        UnsupportedEncoding: the body is compressed.
        Postpone: a form takes too long for a worker's loop.
    """

    def __init__(
        self,
        environ: "WSGIEnvironment",
        settings: Settings,
        part_name: re.Pattern[str] = IMAGE_NAME,
    ) -> None:
        """``part_name`` matches the names of a form's parts that are images."""
        self._environ = environ
        self._settings = settings
        self._part_name = part_name
        self.many = False
        """Whether the client sent a list, and so gets one; final after the iteration."""

    def __iter__(self) -> Iterator[bytes | ConvoyError]:
        coding = self._environ.get("HTTP_CONTENT_ENCODING", "").strip().lower()
        if coding not in ("", "identity"):
            raise UnsupportedEncoding(
                f"Content-Encoding {coding[:40]!r} is not accepted; send the body uncompressed"
            )
        content_type = self._environ.get("CONTENT_TYPE", "")
        kind = content_type.partition(";")[0].strip().lower()
        if not (kind in _RAW or kind.startswith("image/") or kind in _FORMS):
            abort(
                415,
                f"Content-Type {kind[:80]!r} is not accepted; send the image itself (image/* or "
                "application/octet-stream), multipart/form-data or application/json",
            )
        stream, settings = self._environ["wsgi.input"], self._settings
        if kind == "application/json":
            limit = min(settings.max_json_bytes, settings.max_body_bytes)
            advice = "; send larger images as the body itself or as multipart/form-data"
            return self._json(_body_buffer(stream, _body_length(self._environ, limit, advice)))
        length = _body_length(self._environ, settings.max_body_bytes)
        if kind == "multipart/form-data":
            return self._multipart(stream, length, content_type)
        return iter((self._limited(_read_body(stream, length)),))

    def _multipart(
        self, stream: "InputStream", length: int, content_type: str
    ) -> Iterator[bytes | ConvoyError]:
        found = _BOUNDARY.search(content_type)
        if found is None:
            abort(400, "the Content-Type has no boundary; a multipart body needs one")
        boundary = found[1] or found[2]
        count = 0
        ends = time.perf_counter() + LOOP_PARSE_S if IN_LOOP in self._environ else float("inf")
        form = _Form(self._settings.max_image_bytes, self._part_name)
        for image in _image_parts(stream, length, boundary, form, ends):
            count += 1
            self.many = count > 1
            self._check_count(count)
            yield image
        if not count:
            abort(400, "the multipart body has no part named 'image', 'images', 'file' or 'files'")

    def _json(self, body: bytes | mmap) -> Iterator[bytes | ConvoyError]:
        # msgspec checks a list only after decoding all of it, and holds the interpreter meanwhile.
        # So bodies with too many strings (two quotes each, also for names), other values or escapes
        # are refused before.
        limit = self._settings.max_batch
        self._check_count(_count(body, b'"', 2 * limit + 6) // 2 - 2)
        if _count(body, b",", 2 * limit + 4) > 2 * limit + 3:  # a data URL contains a comma too
            abort(400, f"the JSON body has too many values; send at most {limit} images")
        has_escapes = body.find(b"\\", 0) >= 0
        max_escapes = len(body) // MIN_BYTES_PER_ESCAPE + MAX_FREE_ESCAPES
        if has_escapes and body[:].count(b"\\") > max_escapes:
            abort(
                400, f"the JSON body has more than {max_escapes:,} escapes (\\); base64 needs none"
            )
        start = len(BYTE_ORDER_MARK) if body[: len(BYTE_ORDER_MARK)] == BYTE_ORDER_MARK else 0
        try:
            with _paced(len(body)):
                parsed = msgspec.json.decode(memoryview(body)[start:], type=JsonBody)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            abort(400, f'the JSON body is not {{"image": …}} or {{"images": […]}}: {error}')
        is_one = _first(parsed.image) != b"n"  # not null
        if is_one == (parsed.images is not None):
            abort(400, "the JSON body needs exactly one of 'image' and 'images'")
        self.many = not is_one
        texts = [parsed.image] if is_one else parsed.images or []
        if not texts:
            abort(400, "'images' in the JSON body is empty; send at least one image")
        self._check_count(len(texts))
        if any(_first(text) != b'"' for text in texts):
            abort(400, "an image in the JSON body is not a string; send it as base64")
        for text in texts:
            try:
                with _paced(memoryview(text).nbytes):
                    decoded = _from_base64(
                        _characters(text, has_escapes), self._settings.max_image_bytes
                    )
                yield decoded
            except ValueError as error:
                yield InvalidImage(f"the image is not base64: {error}")
            except ConvoyError as error:
                yield error

    def _check_count(self, count: int) -> None:
        if count > self._settings.max_batch:
            abort(413, f"the request has more than {self._settings.max_batch} images; send fewer")

    def _limited(self, image: bytes) -> bytes | ConvoyError:
        limit = self._settings.max_image_bytes
        return image if len(image) <= limit else too_large(len(image), limit)


class _OneAtATime:
    """A context manager that admits one thread at a time, with pauses.

    A thread that had to wait sleeps for as long as the thread before it worked. Decoding JSON and
    base64 holds the interpreter. While eight clients posted 4 MB each, other clients waited for
    0.9 s if all bodies were decoded at once, and for 64 ms if one after the other without a pause.
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


def _paced(size: int) -> contextlib.AbstractContextManager[None]:
    """The context for decoding ``size`` bytes of JSON or base64; small ones never wait."""
    return _one_large if size > LARGE_JSON_BYTES else contextlib.nullcontext()


def _count(body: bytes | mmap, character: bytes, limit: int) -> int:
    """How often ``character`` occurs in ``body``, at most ``limit``: each one costs a search."""
    count, at = 0, body.find(character, 0)
    while at >= 0 and count < limit:
        count, at = count + 1, body.find(character, at + 1)
    return count


def too_large(size: int, limit: int) -> ImageTooLarge:
    """The error for an image of ``size`` bytes; at most ``limit`` bytes are accepted."""
    return ImageTooLarge(f"the image has {size:,} bytes; at most {limit:,} are accepted")


def _first(value: msgspec.Raw) -> bytes:
    """The first byte of a JSON value, which determines its type."""
    return bytes(memoryview(value)[:1])


def _characters(text: msgspec.Raw, has_escapes: bool) -> memoryview:
    """The characters of a JSON string; raises ``ValueError`` if one is not ASCII."""
    view = memoryview(text)
    if has_escapes:
        return memoryview(msgspec.json.decode(view, type=str).encode("ascii"))
    return view[1:-1]


def _from_base64(text: memoryview, limit: int) -> bytes:
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


def _image_parts(
    stream: "InputStream", length: int, boundary: str, form: "_Form", ends: float
) -> Iterator[bytes | ConvoyError]:
    """The parts whose names mark them as images; one over the limit is skipped and not kept.

    Raises:
        HTTPException: the body is malformed, or breaks a limit (400 or 413).
        Postpone: ``time.perf_counter()`` is past ``ends`` at the start of a part.
    """
    try:
        # Clients send file names in any encoding; Latin-1 accepts all, and the names are not used.
        with PushMultipartParser(
            boundary,
            length,
            header_charset="latin-1",
            max_header_size=MAX_PART_HEADER_BYTES,
            strict=True,
        ) as parser:
            for chunk in _chunks(stream, length):
                for event in parser.parse(chunk):
                    if isinstance(event, MultipartSegment):
                        if time.perf_counter() > ends:
                            raise Postpone
                        form.begin_part(event.name or "")
                    elif event:
                        form.add(event)
                    elif form.in_image:
                        yield form.image()
                form.check_other_bytes(len(chunk))
    except ParserLimitReached as error:
        abort(413, f"the multipart body cannot be read: {error}")
    except MultipartError as error:
        abort(400, f"the multipart body cannot be read: {error}")


def _chunks(stream: "InputStream", length: int) -> Iterator[bytes]:
    """The body in chunks; the last one is empty."""
    while length:
        size = length if length < CHUNK_BYTES + EPILOGUE_BYTES else CHUNK_BYTES
        chunk = stream.read(size)
        if not chunk:
            break
        length -= len(chunk)
        yield chunk
    yield b""


class _Form:
    """Collects the images of a multipart body, and checks its limits."""

    def __init__(self, max_image_bytes: int, part_name: re.Pattern[str]) -> None:
        self._part_name = part_name
        self.in_image = False
        self._limit = max_image_bytes
        self._size = 0
        self._pieces: list[bytes] = []
        self._other_parts = self._other_bytes = 0

    def begin_part(self, name: str) -> None:
        self.in_image = self._part_name.fullmatch(name) is not None
        self._size, self._pieces = 0, []
        self._other_parts += not self.in_image
        if self._other_parts > MAX_OTHER_PARTS:
            abort(413, f"the multipart body has more than {MAX_OTHER_PARTS} parts without an image")

    def add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self.in_image:
            self._other_bytes -= len(piece)
            if self._size <= self._limit:
                self._pieces.append(piece)

    def image(self) -> bytes | ConvoyError:
        """The image of the part that has just ended, or the error that it is too large."""
        if self._size > self._limit:
            return too_large(self._size, self._limit)
        return b"".join(self._pieces)

    def check_other_bytes(self, parsed: int) -> None:
        """Count ``parsed`` bytes of the body; ``add`` has subtracted the bytes of images."""
        self._other_bytes += parsed
        if self._other_bytes > MAX_OTHER_BYTES:
            abort(
                413, f"the multipart body has more than {MAX_OTHER_BYTES:,} bytes outside of images"
            )


def _body_length(environ: "WSGIEnvironment", limit: int, advice: str = "") -> int:
    """The Content-Length of the request, checked before the body is read.

    ``advice`` is added to the text of the 413.

    Raises:
        HTTPException: 411 if the body is chunked, so its length is unknown; 413 if it is longer
            than ``limit``; 400 if there is no body.
    """
    if "HTTP_TRANSFER_ENCODING" in environ:
        abort(411, "send a Content-Length; chunked bodies are not accepted")
    text = environ.get("CONTENT_LENGTH", "")
    if not _LENGTH.fullmatch(text):
        abort(400, "the body is empty; send the bytes of an image")
    length = int(text)
    if length > limit:
        abort(413, f"the body has {length:,} bytes; at most {limit:,} are accepted{advice}")
    return length


def _read_body(stream: "InputStream", length: int) -> bytes:
    """The complete body; answers 400 if it is empty or shorter than ``length``."""
    body: bytes = stream.read(length)
    if len(body) != length:
        abort(400, f"the body ended after {len(body):,} of {length:,} bytes; send all of it")
    if not body:
        abort(400, "the body is empty; send the bytes of an image")
    return body


def _body_buffer(stream: "InputStream | mmap", length: int) -> bytes | mmap:
    """As ``_read_body``, but without a copy if the worker keeps the body in memory pages."""
    return stream if isinstance(stream, mmap) else _read_body(stream, length)
