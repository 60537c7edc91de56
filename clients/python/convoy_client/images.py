"""Turns what a caller passes as a picture into the bytes of an encoded picture."""

import os
import sys
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from convoy_client.errors import InvalidImage
from convoy_client.png import COLOUR_TYPES, encode_png

# Modes that Pillow writes as PNG without loss.
PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
# EXIF 2.32, 4.6.4 A.
ORIENTATION_TAG = 0x0112


@runtime_checkable
class ArrayLike(Protocol):
    """A numpy array, or an object that numpy can turn into one."""

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        """The array."""


class PillowLike(Protocol):
    """A Pillow image."""

    @property
    def mode(self) -> str:
        """The kind of its pixels, such as ``RGB``."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:  # noqa: A002
        """Write the image to a file."""


ImageInput = str | os.PathLike[str] | bytes | bytearray | memoryview | ArrayLike | PillowLike
"""A path, an encoded picture, a uint8 array (H, W), (H, W, 1) or (H, W, 3), or a PIL image."""


def encoded(image: ImageInput) -> bytes:
    """The bytes to send for ``image``. Arrays and PIL images become PNG, without loss.

    Raises:
        InvalidImage: the file cannot be read or is empty, or the object is not a picture.
    """
    if isinstance(image, str | os.PathLike):
        return _file_content(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return _not_empty(bytes(image), "the picture has no bytes")
    if _is_pillow(image):
        return _encode_pillow(image)
    if isinstance(image, ArrayLike):
        return _encode_array(image)
    raise InvalidImage(
        f"{type(image).__name__} is not a picture; pass a path, bytes, an array or a PIL image"
    )


def _file_content(path: str | os.PathLike[str]) -> bytes:
    name = os.fspath(path)
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        raise InvalidImage(f"{name}: {error.strerror or error}") from error
    except ValueError as error:  # a null character
        raise InvalidImage(f"{name!r} is not a path: {error}") from error
    return _not_empty(content, f"{name}: the file is empty")


def _not_empty(content: bytes, message: str) -> bytes:
    if not content:
        raise InvalidImage(message)
    return content


def _is_pillow(image: object) -> bool:
    """Whether ``image`` is a Pillow image. If it is, the caller has already imported Pillow."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(image, module.Image)


def _encode_pillow(image: Any) -> bytes:
    """``image`` as PNG, with the EXIF orientation that Pillow has not applied yet."""
    buffer = BytesIO()
    try:
        image.load()
        if image.mode not in PNG_MODES:
            raise InvalidImage(
                f"PNG cannot hold an image of mode {image.mode}; pass image.convert('RGB')"
            )
        exif = sys.modules["PIL.Image"].Exif()
        if orientation := image.getexif().get(ORIENTATION_TAG):
            exif[ORIENTATION_TAG] = orientation
        image.save(buffer, "PNG", compress_level=1, exif=exif)
    except (
        OSError,
        ValueError,
        SyntaxError,
    ) as error:  # the types that Pillow raises for bad files
        raise InvalidImage(f"the PIL image cannot be encoded: {error}") from error
    return buffer.getvalue()


def _encode_array(image: ArrayLike) -> bytes:
    import numpy as np  # the caller has an array, so the caller has numpy

    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise InvalidImage(
            f"the array has dtype {array.dtype}; pass uint8, for example "
            "(array * 255).round().astype('uint8') if its values are from 0 to 1"
        )
    grey_or_colour = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in COLOUR_TYPES)
    if not grey_or_colour or 0 in array.shape:
        raise InvalidImage(
            f"the array has shape {array.shape}; pass (height, width), (height, width, 1) or "
            "(height, width, 3), without a batch dimension and with the channels last"
        )
    channels = array.shape[2] if array.ndim == 3 else 1
    return encode_png(array.tobytes(), array.shape[1], array.shape[0], channels)
