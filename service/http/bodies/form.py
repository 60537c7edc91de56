"""Reads the images out of a multipart form."""

import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser
from werkzeug.exceptions import abort

from registry.core.errors import ConvoyError
from service.http.bodies.reading import too_large
from service.server.protocol import Postpone

if TYPE_CHECKING:
    from _typeshed.wsgi import InputStream

CHUNK_BYTES = 64 * 1024
# The strict parser accepts bytes after the last boundary only in the chunk with that boundary.
EPILOGUE_BYTES = 4 * 1024
# Limits for parts of a form that are not images, and for all bytes of a form outside of images.
MAX_OTHER_PARTS = 8
MAX_OTHER_BYTES = 256 * 1024
MAX_PART_HEADER_BYTES = 1024


def image_parts(
    stream: "InputStream", length: int, boundary: str, form: "Form", ends: float
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


class Form:
    """Collects the images of a multipart body, and checks its limits."""

    def __init__(self, max_image_bytes: int, part_name: re.Pattern[str]) -> None:
        self._part_name = part_name
        self.in_image = False
        self._limit = max_image_bytes
        self._size = 0
        self._pieces: list[bytes] = []
        self._other_parts = self._other_bytes = 0

    def begin_part(self, name: str) -> None:
        """Begin the part ``name``; answers 413 if too many parts are not images."""
        self.in_image = self._part_name.fullmatch(name) is not None
        self._size, self._pieces = 0, []
        self._other_parts += not self.in_image
        if self._other_parts > MAX_OTHER_PARTS:
            abort(413, f"the multipart body has more than {MAX_OTHER_PARTS} parts without an image")

    def add(self, piece: bytes) -> None:
        """Add a ``piece`` of the current part."""
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
