"""Brings a decoded picture to the size that a ``PreprocessSpec`` asks for."""

from io import BytesIO

import numpy as np
from PIL import Image

from registry.model.image.resize import centred, resize, sizes_of
from registry.model.manifest import PreprocessSpec

_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def fit(
    image: Image.Image, spec: PreprocessSpec, size: tuple[float, float], is_turned: bool
) -> Image.Image:
    """The picture in the size that ``spec`` asks for, resized and cut out.

    Args:
        image: the decoded picture.
        spec: the preprocessing.
        size: width and height of the picture, from ``_shrink_on_load``.
        is_turned: whether the result will be turned by 90°.
    """
    target = _turned((spec.width_px, spec.height_px), is_turned)
    if spec.letterbox_level is not None:
        return _letterboxed(image, spec, size, target)
    if spec.resize_shorter_px is not None:
        whole = sizes_of(*size, spec.resize_shorter_px, spec.longer_side == "down")
    else:
        whole = _turned(spec.resize_px, is_turned) if spec.resize_px else target
    to_even = spec.crop_offset == "even"
    left, top = centred(whole[0], target[0], to_even), centred(whole[1], target[1], to_even)
    cut = (left, top, left + target[0], top + target[1])
    if spec.jpeg_quality is not None:
        resized = _resized(image, spec, size, whole)
        if spec.jpeg_of == "resized":
            return _as_jpeg(resized, spec.jpeg_quality).crop(cut)
        return _as_jpeg(resized.crop(cut), spec.jpeg_quality)
    is_same = whole[0] == size[0] and whole[1] == size[1]
    if whole == target:
        return _resized(image, spec, size, whole)
    if is_same or spec.resampler != "pillow" or not spec.crop_early:
        return _resized(image, spec, size, whole).crop(cut)
    # A quarter less work on a landscape photograph.
    across, down = size[0] / whole[0], size[1] / whole[1]
    # Pillow refuses a box that passes the edge by a rounding error.
    end = min(cut[2] * across, size[0]), min(cut[3] * down, size[1])
    box = (left * across, top * down, *end)
    return image.resize(target, _INTERPOLATIONS[spec.interpolation], box=box)


def _turned(size: tuple[int, int], is_turned: bool) -> tuple[int, int]:
    return (size[1], size[0]) if is_turned else size


def _resized(
    image: Image.Image, spec: PreprocessSpec, size: tuple[float, float], wanted: tuple[int, int]
) -> Image.Image:
    """The whole picture, whose size is ``size``, in the ``wanted`` width and height."""
    if wanted[0] == size[0] and wanted[1] == size[1]:
        return image
    if spec.resampler == "pillow":
        return image.resize(wanted, _INTERPOLATIONS[spec.interpolation], box=(0, 0, *size))
    pixels = np.asarray(image)
    deep = pixels.reshape(*pixels.shape[:2], -1)
    resized = resize(deep, *wanted, spec.interpolation, spec.resampler)
    return Image.fromarray(resized.reshape(*resized.shape[:2], *pixels.shape[2:]))


def _letterboxed(
    image: Image.Image, spec: PreprocessSpec, size: tuple[float, float], target: tuple[int, int]
) -> Image.Image:
    """The whole picture, as large as it fits into ``target``, in the middle of one level."""
    scale = min(target[0] / size[0], target[1] / size[1])
    wide, high = (max(1, round(side * scale)) for side in size)
    level = spec.letterbox_level or 0
    made = Image.new(image.mode, target, level if image.mode == "L" else (level,) * 3)
    corner = ((target[0] - wide) // 2, (target[1] - high) // 2)
    made.paste(_resized(image, spec, size, (wide, high)), corner)
    return made


def _as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The picture after it was written as a JPEG and read again."""
    written = BytesIO()
    image.save(written, "JPEG", quality=quality)
    read = Image.open(written, formats=("JPEG",))
    read.load()
    return read
