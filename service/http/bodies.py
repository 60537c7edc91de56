"""The images in a request's body, in whichever of its forms the client chose."""

import contextlib
import re
import time
from collections.abc import Iterator
from threading import Lock
from typing import TYPE_CHECKING

import msgspec
import pybase64
from msgspec import Struct
from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser
from werkzeug.exceptions import abort

from registry.core.errors import ConvoyError, ImageTooLarge, InvalidImage, UnsupportedEncoding
from service.http.request_context import body_buffer, body_length, read_body
from service.server.protocol import IN_LOOP, Postpone
from service.settings import Settings

if TYPE_CHECKING:
    from mmap import mmap

    from _typeshed.wsgi import InputStream, WSGIEnvironment

CHUNK_BYTES = 64 * 1024
# A strict parser takes what follows the last boundary only in the chunk of that boundary.
EPILOGUE_BYTES = 4 * 1024
# Parsing the parts of a form may take so long in a worker's loop.
LOOP_PARSE_S = 0.01
# Parts of a form that are not images, and the bytes of everything in it that is not an image.
MAX_OTHER_PARTS = 8
MAX_OTHER_BYTES = 256 * 1024
MAX_PART_HEADER_BYTES = 1024
MAX_DATA_URL_HEAD = 256
LARGE_JSON_BYTES = 256 * 1024
# Writers of JSON escape one in 64 characters of base64, or in 32, and ends of lines.
MIN_BYTES_PER_ESCAPE = 8
MAX_FREE_ESCAPES = 1024
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# curl --data-binary says urlencoded unless it is told otherwise; S3 says binary/octet-stream.
_RAW = {
    "",
    "application/octet-stream",
    "application/x-www-form-urlencoded",
    "binary/octet-stream",
}
_FORMS = {"multipart/form-data", "application/json"}
# Also unquoted with characters that RFC 2045 wants quoted, as some clients write it.
_BOUNDARY = re.compile(r";\s*boundary=(?:\"([^\"]{1,200})\"|([^;\"\s]{1,200}))", re.IGNORECASE)
IMAGE_NAME = re.compile(r"(?:image|file)s?(?:\[[0-9]*\])?", re.ASCII)
# RFC 4648, section 5, as section 4 writes it.
_STANDARD_BASE64 = bytes.maketrans(b"-_", b"+/")


class JsonBody(Struct, forbid_unknown_fields=True):
    """``{"image": "<base64>"}`` or ``{"images": ["<base64>", …]}``.

    The strings are slices of the body, as JSON writes them: copying one of 4 MB takes 10 ms.
    """

    image: msgspec.Raw = msgspec.Raw(b"null")
    images: list[msgspec.Raw] | None = None


class Images:
    """The encoded images of a body, one after the other as they arrive.

    Iterating gives the bytes of each, or the error that kept it from being read. It raises
    ``HTTPException`` when the whole body cannot be read (400, 411, 413 or 415),
    ``UnsupportedEncoding`` when the body is compressed, and ``Postpone`` when a form takes too long
    for a worker's loop.
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
        """Whether the client sent a list, so gets one; known when all images have arrived."""

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
            return self._json(body_buffer(stream, body_length(self._environ, limit, advice)))
        length = body_length(self._environ, settings.max_body_bytes)
        if kind == "multipart/form-data":
            return self._multipart(stream, length, content_type)
        return iter((self._limited(read_body(stream, length)),))

    def _multipart(
        self, stream: "InputStream", length: int, content_type: str
    ) -> Iterator[bytes | ConvoyError]:
        found = _BOUNDARY.search(content_type)
        if found is None:
            abort(400, "the Content-Type of a multipart body needs a boundary")
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

    def _json(self, body: "bytes | mmap") -> Iterator[bytes | ConvoyError]:
        # Many strings (each, and each name, has two quotes), other values or escapes would have
        # msgspec hold the interpreter for long: it checks a list only when all of it is decoded.
        most = self._settings.max_batch
        self._check_count(_count(body, b'"', 2 * most + 6) // 2 - 2)
        if _count(body, b",", 2 * most + 4) > 2 * most + 3:  # a data URL has one of its own
            abort(400, f"the JSON body has more values than {most} images have")
        has_escapes = body.find(b"\\", 0) >= 0
        max_escapes = len(body) // MIN_BYTES_PER_ESCAPE + MAX_FREE_ESCAPES
        if has_escapes and body[:].count(b"\\") > max_escapes:
            abort(400, "the JSON body has more escapes (\\) than base64 has use for")
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
            abort(400, "0 images in one request; 'images' needs at least one")
        self._check_count(len(texts))
        if any(_first(text) != b'"' for text in texts):
            abort(400, "an image in the JSON body is not a string of base64")
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
            abort(413, f"more than {self._settings.max_batch} images in one request")

    def _limited(self, image: bytes) -> bytes | ConvoyError:
        limit = self._settings.max_image_bytes
        return image if len(image) <= limit else too_large(len(image), limit)


class _OneAtATime:
    """A context for one thread at a time; a thread that had to wait rests in it first.

    It rests for as long as the thread before it worked. JSON and base64 are decoded with the
    interpreter held: with eight clients that post 4 MB, others waited for 0.9 s when all were
    decoded at once, and for 64 ms one after the other without a rest.
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
    """For decoding JSON or base64 of so many bytes; small ones never wait."""
    return _one_large if size > LARGE_JSON_BYTES else contextlib.nullcontext()


def _count(body: "bytes | mmap", what: bytes, most: int) -> int:
    """How often ``body`` has ``what``; counting ends at ``most``, as each costs a search."""
    count, at = 0, body.find(what, 0)
    while at >= 0 and count < most:
        count, at = count + 1, body.find(what, at + 1)
    return count


def too_large(size: int, limit: int) -> ImageTooLarge:
    return ImageTooLarge(f"the image has {size:,} bytes; at most {limit:,} are accepted")


def _first(value: msgspec.Raw) -> bytes:
    """The first byte of a JSON value, which tells its type."""
    return bytes(memoryview(value)[:1])


def _characters(text: msgspec.Raw, has_escapes: bool) -> memoryview:
    """The characters of a JSON string; raises ``ValueError`` where one cannot be base64."""
    view = memoryview(text)
    if has_escapes:
        return memoryview(msgspec.json.decode(view, type=str).encode("ascii"))
    return view[1:-1]


def _from_base64(text: memoryview, limit: int) -> bytes:
    """The bytes of ``text``: base64 as RFC 4648 or MIME writes it, padded or not, or a data URL.

    Raises:
        ImageTooLarge: they would be more than ``limit``; found before any of them is decoded.
        ValueError: the text is something else.
    """
    head = bytes(text[:MAX_DATA_URL_HEAD])
    if head[:5].lower() == b"data:":
        head = head.partition(b",")[0]
        if not head.endswith(b";base64"):
            begin = head[:40].decode(errors="replace")
            raise ValueError(f"the data URL begins with {begin!r}, not with 'data:…;base64,'")
        text = text[len(head) + 1 :]
    if text.nbytes // 4 * 3 - 2 <= limit:
        with contextlib.suppress(ValueError):  # it may be written in another of the ways
            return pybase64.b64decode(text, validate=True)
    data = bytes(text).translate(_STANDARD_BASE64, b" \t\r\n").rstrip(b"=")
    size = len(data) * 3 // 4
    if size > limit:
        raise too_large(size, limit)
    return pybase64.b64decode(data + b"=" * (-len(data) % 4), validate=True)


def _image_parts(
    stream: "InputStream", length: int, boundary: str, form: "_Form", ends: float
) -> Iterator[bytes | ConvoyError]:
    """The parts that are images by their name; one over the limit is read past and not kept.

    Raises ``Postpone`` when ``time.perf_counter()`` is past ``ends`` at the start of a part.
    """
    try:
        # Browsers and scripts name files in any encoding; the names mean nothing here.
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
    """The body in pieces, the last of which is empty."""
    while length:
        size = length if length < CHUNK_BYTES + EPILOGUE_BYTES else CHUNK_BYTES
        chunk = stream.read(size)
        if not chunk:
            break
        length -= len(chunk)
        yield chunk
    yield b""


class _Form:
    """What has come of a multipart body, under its limits."""

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
            abort(413, f"the multipart body has more than {MAX_OTHER_PARTS} parts beside images")

    def add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self.in_image:
            self._other_bytes -= len(piece)
            if self._size <= self._limit:
                self._pieces.append(piece)

    def image(self) -> bytes | ConvoyError:
        """The image whose part has ended."""
        if self._size > self._limit:
            return too_large(self._size, self._limit)
        return b"".join(self._pieces)

    def check_other_bytes(self, parsed: int) -> None:
        """Count ``parsed`` bytes of the body, from which ``add`` has taken those of images."""
        self._other_bytes += parsed
        if self._other_bytes > MAX_OTHER_BYTES:
            abort(413, f"the multipart body has more than {MAX_OTHER_BYTES:,} bytes beside images")
