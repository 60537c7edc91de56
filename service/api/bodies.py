"""The images in a request's body, in whichever of its forms the caller chose."""

import base64
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct
from multipart import MultipartError, MultipartSegment, PushMultipartParser
from werkzeug.exceptions import abort
from werkzeug.http import parse_options_header

from registry.errors import ConvoyError, ImageTooLarge, InvalidImage
from service.requests import body_length, read_body
from service.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import InputStream, WSGIEnvironment

CHUNK_BYTES = 64 * 1024
# curl --data-binary says urlencoded unless it is told otherwise.
_RAW = {"", "application/octet-stream", "application/x-www-form-urlencoded"}


class JsonBody(Struct, forbid_unknown_fields=True):
    """``{"image": "<base64>"}`` or ``{"images": ["<base64>", …]}``."""

    image: str | None = None
    images: list[str] | None = None


class Images:
    """The encoded images of a body, one after the other as they arrive.

    Iterating gives the bytes of each, or the error that kept it from being read, and raises
    ``HTTPException`` when the whole body cannot be: 400, 411, 413 or 415.
    """

    def __init__(self, environ: "WSGIEnvironment", settings: Settings) -> None:
        self._environ = environ
        self._settings = settings
        self.many = False
        """Whether the caller sent a list, so gets one; known when all images have arrived."""

    def __iter__(self) -> Iterator[bytes | ConvoyError]:
        content_type = self._environ.get("CONTENT_TYPE", "")
        kind = content_type.partition(";")[0].strip().lower()
        if not (kind in _RAW or kind.startswith("image/") or kind in _FORMS):
            abort(
                415,
                f"Content-Type {kind[:80]!r} is not accepted; send the image itself (image/* or "
                "application/octet-stream), multipart/form-data or application/json",
            )
        length = body_length(self._environ, self._settings.max_body_bytes)
        stream = self._environ["wsgi.input"]
        if kind == "multipart/form-data":
            return self._multipart(stream, length, content_type)
        if kind == "application/json":
            return self._json(read_body(stream, length))
        return iter((self._limited(read_body(stream, length)),))

    def _multipart(
        self, stream: "InputStream", length: int, content_type: str
    ) -> Iterator[bytes | ConvoyError]:
        boundary = parse_options_header(content_type)[1].get("boundary")
        if not boundary:
            abort(400, "the Content-Type of a multipart body needs a boundary")
        count = 0
        for image in _image_parts(stream, length, boundary, self._settings.max_image_bytes):
            count += 1
            self.many = count > 1
            self._check_count(count)
            yield image
        if not count:
            abort(400, "the multipart body has no part named 'image'")

    def _json(self, body: bytes) -> Iterator[bytes | ConvoyError]:
        try:
            parsed = msgspec.json.decode(body, type=JsonBody)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            abort(400, f'the JSON body is not {{"image": …}} or {{"images": […]}}: {error}')
        if (parsed.image is None) == (parsed.images is None):
            abort(400, "the JSON body needs exactly one of 'image' and 'images'")
        self.many = parsed.images is not None
        texts = parsed.images if parsed.images is not None else [str(parsed.image)]
        if not texts:
            abort(400, "0 images in one request; 'images' needs at least one")
        self._check_count(len(texts))
        for text in texts:
            try:
                yield self._limited(base64.b64decode(text, validate=True))
            except ValueError as error:
                yield InvalidImage(f"the image is not base64: {error}")

    def _check_count(self, count: int) -> None:
        if count > self._settings.max_batch:
            abort(413, f"more than {self._settings.max_batch} images in one request")

    def _limited(self, image: bytes) -> bytes | ConvoyError:
        limit = self._settings.max_image_bytes
        return image if len(image) <= limit else too_large(len(image), limit)


_FORMS = {"multipart/form-data", "application/json"}


def too_large(size: int, limit: int) -> ImageTooLarge:
    return ImageTooLarge(f"the image has {size:,} bytes; at most {limit:,} are accepted")


def _image_parts(
    stream: "InputStream", length: int, boundary: str, limit: int
) -> Iterator[bytes | ConvoyError]:
    """The parts named ``image``; what is over ``limit`` is read past and not kept."""
    wanted, size, pieces = False, 0, list[bytes]()
    try:
        # Browsers and scripts name files in any encoding; the names mean nothing here.
        with PushMultipartParser(boundary, length, header_charset="latin-1") as parser:
            while not parser.closed:
                chunk = stream.read(min(length, CHUNK_BYTES)) if length else b""
                length -= len(chunk)
                for event in parser.parse(chunk):
                    if isinstance(event, MultipartSegment):
                        wanted, size, pieces = event.name == "image", 0, []
                    elif event:
                        size += len(event)
                        if wanted and size <= limit:
                            pieces.append(event)
                    elif wanted:
                        yield b"".join(pieces) if size <= limit else too_large(size, limit)
    except MultipartError as error:
        abort(400, f"the multipart body cannot be read: {error}")
