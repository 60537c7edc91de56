"""Decodes images. Training, publishing and serving all use this module, and no other opens images.

It uses Pillow and ``PreprocessSpec``. It contains nothing about networks or HTTP.
"""

import ctypes
import hashlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, _imaging
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from registry.core.errors import ConvoyError, ImageTooLarge, InvalidImage
from registry.model.image.fit import fit
from registry.model.image.limits import (
    DEFAULT_LIMITS,
    MIN_BYTES_PER_PIXEL,
    VARIABLES,
    DecodeLimits,
    check_decoded,
)
from registry.model.image.structure import check_parts
from registry.model.manifest import PreprocessSpec

Pixels = NDArray[np.uint8]
"""One decoded image: uint8, row-major (height, width, channels), C-contiguous."""

# Training and serving accept these formats. Pillow opens more, and runs other programs for some.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# EXIF 2.32, 4.6.4 A: the transposition that undoes each orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = {5, 6, 7, 8}
# Pillow recommends it for thumbnails. docs/decisions/0008 has the loss in accuracy.
REDUCING_GAP = 2
# Pillow warns about each odd tag. One client's picture could write a thousand lines to the log, and
# Python would remember each of them. Pillow also logs some faults, and libtiff prints its own to
# stderr. The error that is raised says what matters.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with suppress(OSError, AttributeError):  # a build of Pillow without libtiff
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

# Large pictures are converted in bands of so many pixels, which takes less memory at once.
BAND_PIXELS = 1_000_000
# Pillow multiplies PNG grey of 2 or 4 bits by these, but not the value that is transparent.
_GREY_STEPS = {"L;2": 85, "L;4": 17}
# Held while training has a picture in memory at its full size that is over serving's limits.
WHOLE_LARGE = threading.Lock()


def decode_image(
    data: bytes, spec: PreprocessSpec, limits: DecodeLimits = DEFAULT_LIMITS
) -> Pixels:
    """The pixels of an encoded image, in the size and mode that ``spec`` asks for.

    EXIF rotation is applied, transparency becomes white, 16-bit grey is scaled by 1/257, CMYK and
    palettes are converted, and an animation gives its first frame. Safe to call from several
    threads.

    Args:
        data: the whole file.
        spec: the preprocessing of the version that will classify the pixels.
        limits: a file that claims or contains more is refused before it is decoded.

    Returns:
        uint8 array of shape ``spec.shape``, read-only.

    Raises:
        UnsupportedImageType: the bytes do not start like any accepted format.
        ImageTooLarge: the image is over one of ``limits``.
        InvalidImage: the bytes cannot be decoded for another reason.
    """
    return _decode(check_parts(data, limits), spec, limits)


def decode_training_image(
    data: bytes, spec: PreprocessSpec, limits: DecodeLimits | None = None
) -> tuple[Pixels, str]:
    """Pixels as from ``decode_image``, and the digest of the picture at its full size.

    The SHA-256 is that of the pixels, not of the file, so a copy in another format or with other
    metadata has the same digest. Safe to call from several threads: a JPEG that is over ``limits``
    at its full size is in memory for one thread at a time.

    Args:
        data: the whole file.
        spec: the preprocessing of the version that will be trained on the pixels.
        limits: by default those that the environment sets for training and the service alike, so
            that the service accepts every picture that trained a version.

    Raises:
        UnsupportedImageType, ImageTooLarge, InvalidImage: as ``decode_image``.
    """
    try:
        limits = limits or DecodeLimits.from_environment()
        needed = check_parts(data, limits)
        return _decode(needed, spec, limits), _digest(needed, spec, limits)
    except ImageTooLarge as error:
        raise ImageTooLarge(
            f"{error}; {', '.join(VARIABLES)} set the limits of training and of the service"
        ) from error


def _digest(data: bytes, spec: PreprocessSpec, limits: DecodeLimits) -> str:
    """The SHA-256 of the upright picture: of its size and its pixels as RGB."""
    with _opened(data) as image, _alone_if_large(image, limits):
        upright = _upright(_opaque(image, data), spec, _orientation(image))
        digest = hashlib.sha256(f"{upright.size}".encode())
        for _, band in _bands(upright):
            digest.update(band.convert("RGB").tobytes())
        return digest.hexdigest()


def _alone_if_large(image: Image.Image, limits: DecodeLimits) -> AbstractContextManager[object]:
    is_large = _decoded_bytes(image) > limits.max_decoded_bytes
    return WHOLE_LARGE if is_large else nullcontext()


def _decode(data: bytes, spec: PreprocessSpec, limits: DecodeLimits) -> Pixels:
    with _opened(data) as image:
        size = _shrink_on_load(image, spec)
        _check_decoded(image, limits)
        opaque = _opaque(image, data)
        orientation = _orientation(image)
        mode = "L" if spec.mode == "L" else "RGB"
        plain = opaque if opaque.mode == mode else opaque.convert(mode)
        is_turned = orientation in QUARTER_TURNS and spec.exif == "transpose"
        if spec.crop_early or spec.shrink_on_load:  # as fast as it can: turn the small picture
            fitted = _upright(fit(plain, spec, size, is_turned), spec, orientation)
        else:  # as other libraries do, which round the crop of the upright picture
            upright = _upright(plain, spec, orientation)
            fitted = fit(upright, spec, size[::-1] if is_turned else size, is_turned=False)
        pixels = np.frombuffer(fitted.tobytes(), dtype=np.uint8).reshape(spec.shape)
        return in_order(pixels, spec)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    with _decoding(), Image.open(BytesIO(data), formats=FORMATS) as image:
        yield image


def _check_decoded(image: Image.Image, limits: DecodeLimits) -> None:
    """Refuse a JPEG that is too large although it was shrunk. The header settles other formats."""
    if isinstance(image, JpegImageFile):
        check_decoded(_decoded_bytes(image), image.size, limits)


def _decoded_bytes(image: Image.Image) -> int:
    return image.width * image.height * max(MIN_BYTES_PER_PIXEL, len(image.getbands()))


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn Pillow's errors into ``InvalidImage`` or ``ImageTooLarge``.

    Pillow raises a dozen kinds of exceptions for bad bytes.
    """
    try:
        yield
    except ConvoyError:
        raise
    except _BOMBS as error:
        raise ImageTooLarge(
            "the image claims more pixels than can be decoded safely; send a smaller one"
        ) from error
    except Exception as error:
        reason = str(error) if isinstance(error, OSError) else type(error).__name__
        raise InvalidImage(f"the image cannot be decoded: {_without_address(reason)}") from error


def in_order(pixels: Pixels, spec: PreprocessSpec) -> Pixels:
    """Pixels (…, C) in RGB in the order of ``spec``, or the other way round."""
    return np.ascontiguousarray(pixels[..., ::-1]) if spec.mode == "BGR" else pixels


def encode_png(pixels: Pixels) -> bytes:
    """``pixels`` as a PNG, from which ``decode_image`` returns the same pixels at the same size."""
    buffer = BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _shrink_on_load(image: Image.Image, spec: PreprocessSpec) -> tuple[float, float]:
    """Have a large JPEG decoded at 1/2, 1/4 or 1/8 of its size, in a fraction of the time.

    At least ``REDUCING_GAP`` times the needed size stays, so that the later resize can average.

    Returns:
        Width and height of the picture in decoded pixels. They may be fractions, because the
        picture may cover only a part of the last decoded row and column.
    """
    if not isinstance(image, JpegImageFile) or not spec.shrink_on_load:
        return image.size
    width_px, height_px = image.size
    side_px = spec.resize_shorter_px or max(spec.resize_px or (spec.width_px, spec.height_px))
    needed_px = REDUCING_GAP * side_px
    for factor in (8, 4, 2):
        smaller = (width_px // factor, height_px // factor)
        if min(smaller) >= needed_px:
            image.draft(None, smaller)
            return width_px / factor, height_px / factor
    return image.size


def _upright(image: Image.Image, spec: PreprocessSpec, orientation: int) -> Image.Image:
    """The picture turned upright by its EXIF orientation, if ``spec`` asks for that."""
    turn = _TURNS.get(orientation) if spec.exif == "transpose" else None
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 if there is none.

    ``ImageOps.exif_transpose`` would refuse a picture for any other odd tag.
    """
    if image.format == "TIFF" or not image.info:
        return 1  # Pillow turns a TIFF itself when it is loaded
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # noqa: BLE001 - the picture may be good although its EXIF block is broken
        return 1


def _opaque(image: Image.Image, data: bytes) -> Image.Image:
    """The decoded picture in 8 bits without transparency: 16-bit grey is scaled, clear is white."""
    _load(image, data)
    if image.mode == "F":
        raise InvalidImage(
            "images of floating-point pixels are not accepted, because their range is unknown; "
            "convert the image to 8 bits"
        )
    if image.mode.startswith("I"):  # 16-bit grey; convert("L") would saturate instead of scale
        return _in_bands(image, "L", _narrow)
    return _in_bands(image, "RGB", _on_white) if image.has_transparency_data else image


def _load(image: Image.Image, data: bytes) -> None:
    """Decode, and scale a PNG's transparent colour to the depth of the decoded pixels."""
    depth = image.tile[0].args if isinstance(image, PngImageFile) and image.tile else None
    image.load()
    colour = image.info.get("transparency")
    if depth in ("L;2", "L;4") and isinstance(colour, int):
        image.info["transparency"] = colour * _GREY_STEPS[depth]
    elif depth == "RGB;16B" and isinstance(colour, tuple):
        del image.info["transparency"]
        image.putalpha(_where_not(image, data, colour))


def _where_not(image: Image.Image, data: bytes, colour: tuple[int, int, int]) -> Image.Image:
    """An alpha channel for the 16-bit PNG ``data``: 0 where a pixel has ``colour``, else 255.

    Pillow keeps only the high byte of each value, so the low bytes are decoded separately.
    """
    equal = np.ones((image.height, image.width), dtype=bool)
    with Image.open(BytesIO(data), formats=("PNG",)) as low:
        # Read as little-endian: Pillow then keeps the low bytes.
        low.tile = [low.tile[0]._replace(args="RGB;16L")]
        low.load()
        for band, value in enumerate(colour):
            equal &= np.asarray(image.getchannel(band)) == value >> 8
            equal &= np.asarray(low.getchannel(band)) == value & 0xFF
    return Image.fromarray(np.where(equal, np.uint8(0), np.uint8(255)))


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Horizontal pieces of the picture from top to bottom, each with the number of its top row."""
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _in_bands(
    image: Image.Image, mode: str, change: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """A new picture in ``mode``, from ``change`` applied to each band."""
    made = Image.new(mode, image.size)
    for top, band in _bands(image):
        made.paste(change(band), (0, top))
    return made


def _narrow(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey. The transparent value becomes white."""
    wide = np.asarray(image).clip(0, 65535).astype(np.uint32)
    if isinstance(transparent := image.info.get("transparency"), int):
        wide[wide == transparent] = 65535
    wide *= 255  # these three lines compute (wide + 128) // 257 in a fifth of its time
    wide += 32895
    wide >>= 16
    return Image.fromarray(wide.astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _without_address(reason: str) -> str:
    """``reason`` for clients. Pillow's text may contain the address of the in-memory file."""
    return "unknown or damaged format" if "BytesIO" in reason else reason
