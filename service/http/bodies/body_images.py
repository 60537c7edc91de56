"""``BodyImages``: the images of a body: raw bytes, a multipart form, or JSON with base64."""

import re
import time
from collections.abc import Iterator
from mmap import mmap
from typing import TYPE_CHECKING

from werkzeug.exceptions import abort

from registry.core.errors import ConvoyError
from service.http.bodies.form import Form, image_parts
from service.http.bodies.json_body import check_count, images_of, v1_texts
from service.http.bodies.reading import (
    body_length,
    check_coding,
    json_buffer,
    media_type,
    raw_image,
)
from service.server.protocol import IN_LOOP
from service.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# The time that parsing a form may take in a worker's loop.
LOOP_PARSE_S = 0.01
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

    @property
    def isolates_errors(self) -> bool:
        """Whether an image that fails leaves the others' answers valid: in a list it does."""
        return self.many

    def __iter__(self) -> Iterator[bytes | ConvoyError]:
        check_coding(self._environ)
        kind = media_type(self._environ)
        if not (kind in _RAW or kind.startswith("image/") or kind in _FORMS):
            abort(
                415,
                f"Content-Type {kind[:80]!r} is not accepted; send the image itself (image/* or "
                "application/octet-stream), multipart/form-data or application/json",
            )
        settings = self._settings
        if kind == "application/json":
            return self._json(json_buffer(self._environ, settings))
        if kind == "multipart/form-data":
            length = body_length(self._environ, settings.max_body_bytes)
            return self._multipart(length)
        return iter((raw_image(self._environ, settings),))

    def _multipart(self, length: int) -> Iterator[bytes | ConvoyError]:
        found = _BOUNDARY.search(self._environ["CONTENT_TYPE"])
        if found is None:
            abort(400, "the Content-Type has no boundary; a multipart body needs one")
        boundary = found[1] or found[2]
        count = 0
        ends = time.perf_counter() + LOOP_PARSE_S if IN_LOOP in self._environ else float("inf")
        form = Form(self._settings.max_image_bytes, self._part_name)
        for image in image_parts(self._environ["wsgi.input"], length, boundary, form, ends):
            count += 1
            self.many = count > 1
            check_count(count, self._settings.max_batch)
            yield image
        if not count:
            abort(400, "the multipart body has no part named 'image', 'images', 'file' or 'files'")

    def _json(self, body: bytes | mmap) -> Iterator[bytes | ConvoyError]:
        texts, self.many, has_escapes = v1_texts(body, self._settings.max_batch)
        return images_of(texts, has_escapes, self._settings.max_image_bytes)
