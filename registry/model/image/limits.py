"""``DecodeLimits``: the limits of an accepted picture, in training and in serving."""

import os
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from registry.core.errors import ImageTooLarge, InvalidImage, UsageError
from registry.core.names import unusable

# A pixel counts as at least so many bytes: decoding may turn a smaller one into RGB.
MIN_BYTES_PER_PIXEL = 3
# A JPEG that is decoded from its coefficients may need so many passes over all its samples.
MAX_PASSES = 12
VARIABLES = {
    "CONVOY_MAX_IMAGE_BYTES": "max_bytes",
    "CONVOY_MAX_PIXELS": "max_pixels",
    "CONVOY_MAX_DECODED_BYTES": "max_decoded_bytes",
}

# Operators cannot set higher limits than these. Publishing and proving a version decode with them,
# so that they accept every picture that training accepted.
MAX_FILE_BYTES = 500_000_000
MAX_PIXELS = 150_000_000
MAX_DECODED_BYTES = 450_000_000
FileBytes = Annotated[int, Meta(ge=1, le=MAX_FILE_BYTES)]
PixelCount = Annotated[int, Meta(ge=1, le=MAX_PIXELS)]
DecodedBytes = Annotated[int, Meta(ge=1, le=MAX_DECODED_BYTES)]


class DecodeLimits(Struct, frozen=True):
    """Limits that a picture's bytes must keep before a single pixel is decoded.

    Attributes:
        max_bytes: size of the file.
        max_pixels: width times height, by the header.
        max_decoded_bytes: bytes of the samples that decoding holds at once, counted as at least
            three a pixel. For a progressive JPEG: the samples of all components. For other JPEGs:
            the picture after it was shrunk while decoding. For other formats: the whole picture.
        max_aspect: the longer side divided by the shorter one.
        max_scans: scans of a JPEG. Progressive ones have about ten.
        max_parts: markers of a JPEG, chunks of a PNG (without its pixel data) or WebP, blocks of a
            GIF before its first frame, entries of a TIFF's directory.
    """

    max_bytes: FileBytes = 25 * 1024 * 1024
    max_pixels: PixelCount = 50_000_000
    max_decoded_bytes: DecodedBytes = 80_000_000
    max_aspect: float = 50.0
    max_scans: int = 64
    max_parts: int = 1_000

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "DecodeLimits":
        """The limits in the environment. Training and the service read the same variables.

        Raises:
            UsageError: a value cannot be used; the message names the variable.
        """
        values = {
            field: environment[name] for name, field in VARIABLES.items() if environment.get(name)
        }
        try:
            return msgspec.convert(values, cls, strict=False)
        except msgspec.ValidationError as error:
            raise UsageError(unusable(error, VARIABLES, values)) from error


DEFAULT_LIMITS = DecodeLimits()
# For pictures whose digests were checked, and that were accepted before under an operator's limits.
TRUSTED_LIMITS = DecodeLimits(
    max_bytes=MAX_FILE_BYTES, max_pixels=MAX_PIXELS, max_decoded_bytes=MAX_DECODED_BYTES
)


def check_size(
    size: tuple[int, int], limits: DecodeLimits, bytes_per_pixel: float | None = None
) -> None:
    """Refuse a picture whose size is over ``limits``.

    Args:
        size: width and height in pixels, from the header.
        limits: what is allowed.
        bytes_per_pixel: decoded bytes of one pixel; None if that is not known yet.

    Raises:
        ImageTooLarge: too many pixels, too many decoded bytes, or too long an aspect.
        InvalidImage: the picture has no pixels.
    """
    width_px, height_px = size
    pixels = width_px * height_px
    if min(size) < 1:
        raise InvalidImage(
            f"the image is {width_px}×{height_px} pixels; each side needs at least 1"
        )
    if pixels > limits.max_pixels:
        raise ImageTooLarge(
            f"the image is {width_px}×{height_px} = {pixels:,} pixels; "
            f"at most {limits.max_pixels:,} are accepted"
        )
    # Resizing the shorter side of a 60000×1 strip would need gigabytes.
    if max(size) > limits.max_aspect * min(size):
        raise ImageTooLarge(
            f"the image is {width_px}×{height_px} pixels; "
            f"the longer side may be at most {limits.max_aspect:g} times the shorter"
        )
    if bytes_per_pixel is not None:
        check_decoded(int(pixels * max(MIN_BYTES_PER_PIXEL, bytes_per_pixel)), size, limits)


def check_decoded(size_bytes: int, size: tuple[int, int], limits: DecodeLimits) -> None:
    """Refuse a picture of ``size`` if decoding has to hold too many ``size_bytes`` at once."""
    if size_bytes > limits.max_decoded_bytes:
        raise ImageTooLarge(
            f"the image is {size[0]}×{size[1]} pixels, and decoding it has to hold "
            f"{size_bytes:,} bytes at once; at most {limits.max_decoded_bytes:,} are accepted "
            "(a baseline JPEG needs the fewest)"
        )


def count(number: int, limit: int, what: str) -> int:
    """``number + 1``; ``ImageTooLarge`` if that is over ``limit``. ``what`` names the parts."""
    if number >= limit:
        raise ImageTooLarge(f"the image has more than {limit:,} {what}; save it again with fewer")
    return number + 1
