"""Reads a request's body: checks its coding and its length before the first byte."""

import re
from mmap import mmap
from typing import TYPE_CHECKING

from werkzeug.exceptions import abort

from registry.core.errors import ImageTooLarge, UnsupportedEncoding
from service.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import InputStream, WSGIEnvironment

_LENGTH = re.compile(r"[0-9]{1,15}")


def check_coding(environ: "WSGIEnvironment") -> None:
    """Raise ``UnsupportedEncoding`` if the body is compressed."""
    coding = environ.get("HTTP_CONTENT_ENCODING", "").strip().lower()
    if coding not in ("", "identity"):
        raise UnsupportedEncoding(
            f"Content-Encoding {coding[:40]!r} is not accepted; send the body uncompressed"
        )


def media_type(environ: "WSGIEnvironment") -> str:
    """The Content-Type in lower case, without its parameters; empty if there is none."""
    content_type: str = environ.get("CONTENT_TYPE", "")
    return content_type.partition(";")[0].strip().lower()


def body_length(environ: "WSGIEnvironment", limit: int, advice: str = "") -> int:
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


def read_body(stream: "InputStream", length: int) -> bytes:
    """The complete body; answers 400 if it is empty or shorter than ``length``."""
    body: bytes = stream.read(length)
    if len(body) != length:
        abort(400, f"the body ended after {len(body):,} of {length:,} bytes; send all of it")
    if not body:
        abort(400, "the body is empty; send the bytes of an image")
    return body


def body_buffer(stream: "InputStream | mmap", length: int) -> bytes | mmap:
    """As ``read_body``, but without a copy if the worker keeps the body in memory pages."""
    return stream if isinstance(stream, mmap) else read_body(stream, length)


def json_buffer(environ: "WSGIEnvironment", settings: Settings) -> bytes | mmap:
    """The complete body of a JSON request, which has a lower limit than other bodies."""
    limit = min(settings.max_json_bytes, settings.max_body_bytes)
    advice = "; send larger images as the body itself or as multipart/form-data"
    return body_buffer(environ["wsgi.input"], body_length(environ, limit, advice))


def raw_image(environ: "WSGIEnvironment", settings: Settings) -> bytes | ImageTooLarge:
    """The complete body, which is an encoded image, or the error that it is too large."""
    length = body_length(environ, settings.max_body_bytes)
    return within(read_body(environ["wsgi.input"], length), settings.max_image_bytes)


def too_large(size: int, limit: int) -> ImageTooLarge:
    """The error for an image of ``size`` bytes; at most ``limit`` bytes are accepted."""
    return ImageTooLarge(f"the image has {size:,} bytes; at most {limit:,} are accepted")


def within(image: bytes, limit: int) -> bytes | ImageTooLarge:
    """The encoded ``image``, or the error that it has more than ``limit`` bytes."""
    return image if len(image) <= limit else too_large(len(image), limit)
