"""The one place that opens an image: training, publishing and serving all decode here.

It knows Pillow and the preprocessing contract; it knows neither networks nor HTTP.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from registry.contract import PreprocessSpec, sha256_hex
from registry.errors import ConvoyError, ImageTooLarge, InvalidImage
from registry.picture_parts import DecodeLimits, check_parts, check_size, starts_like_served

Pixels = NDArray[np.uint8]
"""One decoded image: uint8, row-major (height, width, channels), C-contiguous."""

SERVED_FORMATS = ("JPEG", "PNG", "WEBP")
# Pillow opens more, and runs other programs for some of it.
TRAINING_FORMATS = (*SERVED_FORMATS, "BMP", "GIF", "PPM", "TIFF")

_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# EXIF 2.32, 4.6.4 A: what undoes each orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow's own advice for thumbnails; docs/decisions/0008 has what it costs in accuracy.
REDUCING_GAP = 2
# Pillow warns of each odd tag: a picture of a stranger's would write a thousand lines into the log,
# and have Python remember each of them.
warnings.filterwarnings("ignore", module=r"PIL\.")
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

DEFAULT_LIMITS = DecodeLimits()
# The user's own training folder, and golden images, whose digests were checked: cameras make larger
# pictures than strangers may post.
TRUSTED_LIMITS = DecodeLimits(max_pixels=150_000_000)


def decode_image(
    data: bytes, spec: PreprocessSpec, limits: DecodeLimits = DEFAULT_LIMITS
) -> Pixels:
    """The pixels of an encoded image, in the size and mode that ``spec`` asks for.

    EXIF rotation is applied, transparency is laid on white, 16-bit grey is scaled by 1/257, CMYK
    and palettes are converted, and of an animation the first frame is taken. Safe to call from
    several threads.

    Args:
        data: the whole file.
        spec: the contract of the version that will see the pixels.
        limits: refused before decoding when the file claims or contains more.

    Returns:
        uint8 array of shape ``spec.shape``, read-only.

    Raises:
        UnsupportedImageType: the bytes start like none of the accepted formats.
        ImageTooLarge: more of anything than ``limits`` allow.
        InvalidImage: anything else that keeps the bytes from being decoded.
    """
    check_parts(data, limits)
    return _decode(data, spec, limits, SERVED_FORMATS)


def decode_training_image(data: bytes, spec: PreprocessSpec) -> tuple[Pixels, str]:
    """Pixels as ``decode_image`` gives them, of any of ``TRAINING_FORMATS``, and their digest.

    The SHA-256 is of the picture in its full size and not of the file, so that a copy in another
    format, or with other metadata, is known as the same picture.

    Raises:
        ImageTooLarge, InvalidImage: as ``decode_image``.
    """
    if starts_like_served(data):
        check_parts(data, TRUSTED_LIMITS)
    with _decoding(), Image.open(BytesIO(data), formats=TRAINING_FORMATS) as image:
        check_size(image.size, TRUSTED_LIMITS)
        upright = _upright(image, spec).convert("RGB")
        digest = sha256_hex(f"{upright.size}".encode() + upright.tobytes())
    return _decode(data, spec, TRUSTED_LIMITS, TRAINING_FORMATS), digest


def _decode(
    data: bytes, spec: PreprocessSpec, limits: DecodeLimits, formats: tuple[str, ...]
) -> Pixels:
    with _decoding(), Image.open(BytesIO(data), formats=formats) as image:
        check_size(image.size, limits)
        _shrink_on_load(image, spec)
        upright = _upright(image, spec)
        fitted = _fit(upright if upright.mode == spec.mode else upright.convert(spec.mode), spec)
        return np.frombuffer(fitted.tobytes(), dtype=np.uint8).reshape(spec.shape)


@contextmanager
def _decoding() -> Iterator[None]:
    """Whatever Pillow raises, and it raises a dozen kinds on bad bytes, as one of our errors."""
    try:
        yield
    except ConvoyError:
        raise
    except _BOMBS as error:
        raise ImageTooLarge("the image claims more pixels than can be decoded safely") from error
    except Exception as error:
        reason = str(error) if isinstance(error, OSError) else type(error).__name__
        raise InvalidImage(f"the image cannot be decoded: {_without_address(reason)}") from error


def encode_png(pixels: Pixels) -> bytes:
    """``pixels`` as a PNG that ``decode_image`` gives back unchanged at the same size."""
    buffer = BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def as_served(data: bytes, spec: PreprocessSpec) -> bytes:
    """A trusted picture in a format that serving accepts and that decodes to the same pixels.

    Formats outside ``SERVED_FORMATS`` are written anew, at full size and without loss, as PNG.
    """
    if starts_like_served(data):
        return data
    with Image.open(BytesIO(data), formats=TRAINING_FORMATS) as image:
        check_size(image.size, TRUSTED_LIMITS)
        return encode_png(np.asarray(_upright(image, spec).convert("RGB")))


def _shrink_on_load(image: Image.Image, spec: PreprocessSpec) -> None:
    """Have a large JPEG decoded at 1/2, 1/4 or 1/8 of its size, for a fraction of the time.

    At least ``REDUCING_GAP`` times what is needed stays, for the resize after it to average; and
    only a size that divides evenly, so that what is cut out after it is the same to the pixel.
    """
    if not isinstance(image, JpegImageFile):
        return
    width_px, height_px = image.size
    needed_px = REDUCING_GAP * (spec.resize_shorter_px or max(spec.width_px, spec.height_px))
    for factor in (8, 4, 2):
        smaller = (width_px // factor, height_px // factor)
        if min(smaller) >= needed_px and not width_px % factor and not height_px % factor:
            image.draft(None, smaller)
            return


def _upright(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    """The picture as it is meant to be seen: opaque, 8-bit, turned as its EXIF says."""
    image.load()  # first, and here: getexif() may load too, and its failure is not the picture's
    turn = _TURNS.get(_orientation(image)) if spec.exif == "transpose" else None
    return _flatten(image if turn is None else image.transpose(turn))


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation. ImageOps.exif_transpose would refuse a picture for any other odd tag."""
    if not image.info:
        return 1
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # noqa: BLE001 - a broken EXIF block says nothing about the picture
        return 1


def _flatten(image: Image.Image) -> Image.Image:
    """An opaque 8-bit image: wide grey scaled, transparency laid on white."""
    if image.mode.startswith("I"):  # 16-bit grey; convert("L") would saturate instead of scale
        wide = np.asarray(image).clip(0, 65535).astype(np.uint32)
        if isinstance(transparent := image.info.get("transparency"), int):
            wide[wide == transparent] = 65535
        wide *= 255  # and with the next two lines (wide + 128) // 257, in a fifth of the time
        wide += 32895
        wide >>= 16
        return Image.fromarray(wide.astype(np.uint8))
    if image.mode == "F":
        raise InvalidImage(
            "images of floating-point pixels are not accepted: their range is unknown"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image


def _fit(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    target = (spec.width_px, spec.height_px)
    resample = _INTERPOLATIONS[spec.interpolation]
    if spec.resize_shorter_px is None:
        return image if image.size == target else image.resize(target, resample)
    scale = spec.resize_shorter_px / min(image.size)
    width_px, height_px = (max(spec.resize_shorter_px, round(side * scale)) for side in image.size)
    left = (width_px - spec.width_px) // 2
    top = (height_px - spec.height_px) // 2
    right, bottom = left + spec.width_px, top + spec.height_px
    if (width_px, height_px) == image.size:
        return image.crop((left, top, right, bottom))
    # Only what stays is resized: on a landscape photograph a quarter of the work less.
    across, down = image.width / width_px, image.height / height_px
    # Beyond the edge by a rounding error is refused.
    end = min(right * across, image.width), min(bottom * down, image.height)
    return image.resize(target, resample, box=(left * across, top * down, *end))


def _without_address(reason: str) -> str:
    """Pillow names the in-memory file by its address; callers need not see it."""
    return "unknown or damaged format" if "BytesIO" in reason else reason
