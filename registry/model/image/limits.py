"""``DecodeLimits``: what a picture may claim and consist of, in training and in serving."""

import os
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from registry.core.errors import ImageTooLarge, InvalidImage, UsageError
from registry.core.names import unusable

# Of a smaller sample or pixel, what is made of it takes the memory and the time.
MIN_BYTES_PER_PIXEL = 3
# Passes over all samples of a JPEG that is decoded from its coefficients.
MAX_PASSES = 12
VARIABLES = {
    "CONVOY_MAX_IMAGE_BYTES": "max_bytes",
    "CONVOY_MAX_PIXELS": "max_pixels",
    "CONVOY_MAX_DECODED_BYTES": "max_decoded_bytes",
}

# Operators may not set more. Publishing and proving decode with these, so that they accept every
# picture that training has accepted.
MAX_FILE_BYTES = 500_000_000
MAX_PIXELS = 150_000_000
MAX_DECODED_BYTES = 450_000_000
FileBytes = Annotated[int, Meta(ge=1, le=MAX_FILE_BYTES)]
PixelCount = Annotated[int, Meta(ge=1, le=MAX_PIXELS)]
DecodedBytes = Annotated[int, Meta(ge=1, le=MAX_DECODED_BYTES)]


class DecodeLimits(Struct, frozen=True):
    """What a picture may claim, and consist of, before a single pixel of it is decoded.

    Attributes:
        max_bytes: of the file.
        max_pixels: width times height, as the header says.
        max_decoded_bytes: samples that decoding has to hold at once, and at least three bytes a
            pixel: of a progressive JPEG those of all components, of another JPEG what is left
            once it was shrunk while it was decoded, of everything else the whole picture.
        max_aspect: the longer side by the shorter one.
        max_scans: of a JPEG; progressive ones have about ten.
        max_parts: markers of a JPEG, chunks of a PNG or WebP but for a PNG's pixel data, blocks of
            a GIF before its first frame, entries of a TIFF's directory.
    """

    max_bytes: FileBytes = 25 * 1024 * 1024
    max_pixels: PixelCount = 50_000_000
    max_decoded_bytes: DecodedBytes = 80_000_000
    max_aspect: float = 50.0
    max_scans: int = 64
    max_parts: int = 1_000

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "DecodeLimits":
        """The limits that an operator set, in the variables that the service reads too.

        Raises:
            UsageError: a value cannot be used; the text names the variable.
        """
        values = {
            field: environment[name] for name, field in VARIABLES.items() if environment.get(name)
        }
        try:
            return msgspec.convert(values, cls, strict=False)
        except msgspec.ValidationError as error:
            raise UsageError(unusable(error, VARIABLES, values)) from error


DEFAULT_LIMITS = DecodeLimits()
# For pictures whose digests were checked, and that were accepted once, by whatever limits.
TRUSTED_LIMITS = DecodeLimits(
    max_bytes=MAX_FILE_BYTES, max_pixels=MAX_PIXELS, max_decoded_bytes=MAX_DECODED_BYTES
)


def check_size(
    size: tuple[int, int], limits: DecodeLimits, bytes_per_pixel: float | None = None
) -> None:
    """Refuse a picture of ``size``, its width and height in pixels, that is over ``limits``.

    Args:
        size: as the header says.
        limits: what is allowed.
        bytes_per_pixel: what one pixel takes where the picture is decoded whole; None where that
            is not known yet.

    Raises:
        ImageTooLarge: it has too many pixels, or they would take too many bytes, or it is a strip.
        InvalidImage: it has no pixels.
    """
    width_px, height_px = size
    pixels = width_px * height_px
    if min(size) < 1:
        raise InvalidImage(f"the image is {width_px}×{height_px} pixels: it has none")
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
    """Refuse a picture of ``size`` of which decoding has to hold ``size_bytes`` at once."""
    if size_bytes > limits.max_decoded_bytes:
        raise ImageTooLarge(
            f"the image is {size[0]}×{size[1]} pixels, of which decoding has to hold "
            f"{size_bytes:,} bytes at once; at most {limits.max_decoded_bytes:,} are accepted "
            "(a baseline JPEG takes the least)"
        )


def count(number: int, limit: int, what: str) -> int:
    """``number`` and one more; ``ImageTooLarge`` when that is over ``limit``."""
    if number >= limit:
        raise ImageTooLarge(f"the image has more than {limit:,} {what}")
    return number + 1
