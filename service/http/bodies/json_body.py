"""Reads images out of ``{"image": "<base64>"}`` or ``{"images": ["<base64>", …]}``."""

from collections.abc import Iterable, Iterator
from mmap import mmap
from typing import TypeVar

import msgspec
from msgspec import Struct
from werkzeug.exceptions import RequestEntityTooLarge, abort

from registry.core.errors import ConvoyError, InvalidImage
from service.http.bodies.base64_text import (
    characters,
    count,
    first_byte,
    from_base64,
    paced,
)

# JSON encoders escape "/", which is 1 in 64 characters of base64, perhaps "+", and line ends.
MIN_BYTES_PER_ESCAPE = 8
MAX_FREE_ESCAPES = 1024
# Strings of a body that belong to none of its images, such as the names of members.
MAX_OTHER_STRINGS = 2
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
Record = TypeVar("Record")


class JsonBody(Struct, forbid_unknown_fields=True):
    """``{"image": "<base64>"}`` or ``{"images": ["<base64>", …]}``.

    The strings are slices of the body, still quoted and escaped: a copy of 4 MB would take 10 ms.
    """

    image: msgspec.Raw = msgspec.Raw(b"null")
    images: list[msgspec.Raw] | None = None


_JSON_BODY = msgspec.json.Decoder(JsonBody)


def check_structure(body: bytes | mmap, max_images: int, strings_per_image: int = 1) -> bool:
    """Check how many strings, values and escapes a JSON body has, before it is parsed.

    msgspec checks a list only after decoding all of it, and holds the interpreter meanwhile.

    Args:
        body: JSON in UTF-8.
        max_images: the most images that it may have.
        strings_per_image: the most strings for each image, names of members included.

    Returns:
        Whether the body has escapes.

    Raises:
        HTTPException: 413, it has too many strings; 400, it has too many values or escapes.
    """
    max_strings = max_images * strings_per_image + MAX_OTHER_STRINGS
    if count(body, b'"', 2 * max_strings + 1) > 2 * max_strings:
        raise _too_many(max_images)
    max_commas = 2 * max_strings  # a data URL contains a comma, too
    if count(body, b",", max_commas + 1) > max_commas:
        abort(400, f"the JSON body has too many values; send at most {max_images} images")
    return check_escapes(body)


def check_escapes(body: bytes | mmap) -> bool:
    """Whether a JSON body has escapes; answers 400 if it has more than base64 could need."""
    has_escapes = body.find(b"\\", 0) >= 0
    max_escapes = len(body) // MIN_BYTES_PER_ESCAPE + MAX_FREE_ESCAPES
    if has_escapes and body[:].count(b"\\") > max_escapes:
        abort(400, f"the JSON body has more than {max_escapes:,} escapes (\\); base64 needs none")
    return has_escapes


def parse(
    body: bytes | mmap | memoryview, decoder: "msgspec.json.Decoder[Record]", expected: str
) -> Record:
    """The record in a JSON body, which may begin with a byte order mark.

    Raises:
        HTTPException: 400, ``decoder`` cannot parse it; the text says what was ``expected``.
    """
    mark = len(BYTE_ORDER_MARK)
    start = mark if body[:mark] == BYTE_ORDER_MARK else 0
    try:
        with paced(len(body)):
            return decoder.decode(memoryview(body)[start:])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        abort(400, f"the JSON body is not {expected}: {error}")


def images_of(
    texts: Iterable[msgspec.Raw], has_escapes: bool, max_bytes: int
) -> Iterator[bytes | ConvoyError]:
    """Decode JSON strings of base64, each to an image of at most ``max_bytes``, or an error."""
    for text in texts:
        try:
            with paced(memoryview(text).nbytes):
                decoded = from_base64(characters(text, has_escapes), max_bytes)
            yield decoded
        except ValueError as error:
            yield InvalidImage(f"the image is not base64: {error}")
        except ConvoyError as error:
            yield error


def is_text(value: msgspec.Raw) -> bool:
    """Whether a JSON value is a string."""
    return first_byte(value) == b'"'


def v1_texts(body: bytes | mmap, max_images: int) -> tuple[list[msgspec.Raw], bool, bool]:
    """The strings of a ``JsonBody``, whether it has a list of them, and whether it has escapes.

    Raises:
        HTTPException: the body is not a ``JsonBody`` (400), or has too many images (413).
    """
    has_escapes = check_structure(body, max_images)
    parsed = parse(body, _JSON_BODY, '{"image": …} or {"images": […]}')
    is_one = first_byte(parsed.image) != b"n"  # not null
    if is_one == (parsed.images is not None):
        abort(400, "the JSON body needs exactly one of 'image' and 'images'")
    texts = [parsed.image] if is_one else parsed.images or []
    if not texts:
        abort(400, "'images' in the JSON body is empty; send at least one image")
    check_count(len(texts), max_images)
    if not all(map(is_text, texts)):
        abort(400, "an image in the JSON body is not a string; send it as base64")
    return texts, not is_one, has_escapes


def check_count(number: int, max_images: int) -> None:
    """Answer 413 if a request has more than ``max_images`` images."""
    if number > max_images:
        raise _too_many(max_images)


def _too_many(max_images: int) -> RequestEntityTooLarge:
    return RequestEntityTooLarge(f"the request has more than {max_images} images; send fewer")
