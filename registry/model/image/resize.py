"""Resizes pictures by the arithmetic of torch and of OpenCV, which Pillow does not have.

All resamplers use a few pixels for each new one. They differ in how many, and in how they round.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.model.manifest import Interpolation, Resampler

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Whole = NDArray[np.int32]
# The constant of bicubic interpolation: that of OpenCV and torch, and that of Pillow, which torch
# uses with antialiasing.
_BICUBIC, _PILLOW_BICUBIC = -0.75, -0.5
# Without antialiasing, in pixels of the old picture; with it, in pixels of the smaller picture.
_REACH = {"bilinear": 1, "bicubic": 2, "lanczos": 4}
_OPENCV_BITS = 11  # of a weight
_TORCH_BITS = 15
_TORCH_LARGEST_SHIFT = 22


def resize(
    pixels: Bytes, width_px: int, height_px: int, interpolation: Interpolation, resampler: Resampler
) -> Bytes:
    """``pixels`` in another size, as ``resampler`` makes it; not for ``pillow``.

    Args:
        pixels: uint8 (H, W, C).
        width_px: the new width.
        height_px: the new height.
        interpolation: ``nearest`` reads one pixel. Without antialiasing, ``bilinear`` reads 2 a
            side, ``bicubic`` 4, and ``lanczos`` 8. Beyond an edge, the pixel at the edge is read.
        resampler: as in ``PreprocessSpec``.

    Returns:
        uint8 (height_px, width_px, C).

    Sources: ATen/native/cpu/UpSampleKernel.cpp of torch 2.13; resize.cpp of OpenCV 4.12.
    """
    if interpolation == "nearest":
        return _nearest(pixels, width_px, height_px)
    if resampler == "torch":
        narrow = _averaged(pixels, 1, width_px, interpolation)
        return _averaged(narrow, 0, height_px, interpolation)
    if resampler == "opencv" and interpolation != "bicubic":  # which OpenCV computes in floats
        return _as_opencv(pixels, width_px, height_px, interpolation)
    narrow_floats = _sum(pixels, 1, width_px, interpolation)
    resized = _sum(narrow_floats, 0, height_px, interpolation)
    return np.rint(resized).clip(0, 255).astype(np.uint8)


def sizes_of(width: float, height: float, shorter_px: int, rounds_down: bool) -> tuple[int, int]:
    """Width and height of a picture whose shorter side is resized to ``shorter_px``."""
    scale = shorter_px / min(width, height)
    rounded = (
        int(shorter_px * side / min(width, height)) if rounds_down else round(side * scale)
        for side in (width, height)
    )
    wide, high = (max(shorter_px, side) for side in rounded)
    return wide, high


def centred(outer: int, inner: int, to_even: bool) -> int:
    """The offset at which ``inner`` pixels are in the middle of ``outer``."""
    return round((outer - inner) / 2) if to_even else math.floor((outer - inner) / 2)


def _nearest(pixels: Bytes, width_px: int, height_px: int) -> Bytes:
    height, width = pixels.shape[:2]
    # The reciprocal of the reciprocal, as OpenCV computes it: it decides at exact halves.
    rows = np.minimum(np.arange(height_px) * (1 / (height_px / height)), height - 1).astype(np.intp)
    columns = np.minimum(np.arange(width_px) * (1 / (width_px / width)), width - 1).astype(np.intp)
    return np.ascontiguousarray(pixels[rows[:, None], columns])


def _sum(values: NDArray[np.generic], axis: int, size: int, interpolation: Interpolation) -> Floats:
    """``values`` resized along one axis, float32."""
    total: Floats | None = None
    for positions, weights in _taps(values.shape[axis], size, interpolation):
        part = np.take(values, positions, axis).astype(np.float32) * _along(weights, axis)
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None
    return total


def _as_opencv(pixels: Bytes, width_px: int, height_px: int, interpolation: Interpolation) -> Bytes:
    """OpenCV's sums of whole numbers: weights have 11 bits, and only the result is rounded."""
    narrow = np.zeros((pixels.shape[0], width_px, pixels.shape[2]), np.int32)
    for positions, weights in _taps(pixels.shape[1], width_px, interpolation):
        narrow += np.take(pixels, positions, 1) * _along(_opencv_weights(weights), 1)
    total = np.zeros((height_px, *narrow.shape[1:]), np.int32)
    is_bilinear = interpolation == "bilinear"
    for positions, weights in _taps(pixels.shape[0], height_px, interpolation):
        # Bilinear sums have dropped bits, so that products fit 32 bits.
        part = np.take(narrow >> 4 if is_bilinear else narrow, positions, 0)
        part *= _along(_opencv_weights(weights), 0)
        total += part >> 16 if is_bilinear else part
    bits = 2 if is_bilinear else 2 * _OPENCV_BITS
    total += 1 << (bits - 1)
    return (total >> bits).clip(0, 255).astype(np.uint8)


def _opencv_weights(weights: Floats) -> Whole:
    whole: Whole = np.rint(weights * np.float32(1 << _OPENCV_BITS)).astype(np.int32)
    return whole


def _taps(
    before: int, after: int, interpolation: Interpolation
) -> Iterator[tuple[NDArray[np.intp], Floats]]:
    """For each pixel that is read: its position and its weight, of every new pixel."""
    # Libraries compute the place in 32 bits, which decides how weights are rounded.
    centres = ((np.arange(after) + 0.5) * (before / after) - 0.5).astype(np.float32)
    left = np.floor(centres)
    fraction = (centres - left).astype(np.float64)
    reach = _REACH[interpolation]
    weights = [_weight(fraction - place, interpolation) for place in range(1 - reach, reach + 1)]
    total = np.sum(weights, axis=0)  # 1, apart from Lanczos's window
    for place, weight in zip(range(1 - reach, reach + 1), weights, strict=True):
        positions = np.clip(left + place, 0, before - 1).astype(np.intp)
        yield positions, (weight / total).astype(np.float32)


def _weight(distance: NDArray[np.float64], interpolation: Interpolation) -> NDArray[np.float64]:
    """The weight of a pixel at ``distance`` pixels from a new one."""
    d = np.abs(distance)
    if interpolation == "bicubic":
        return _cubic(d, _BICUBIC)
    weight: NDArray[np.float64] = np.maximum(0, 1 - d)
    if interpolation == "lanczos":
        weight = np.where(d < 4, np.sinc(d) * np.sinc(d / 4), 0)
    return weight


def _averaged(values: Bytes, axis: int, size: int, interpolation: Interpolation) -> Bytes:
    """``values`` resized along one axis with torch's antialiasing: weights of 16 bits."""
    before = values.shape[axis]
    if before == size:
        return values
    first, weights = _averaging_weights(before, size, interpolation)
    bits = 0
    largest = weights.max()
    while bits < _TORCH_LARGEST_SHIFT and int(0.5 + largest * 2 ** (bits + 1)) < 1 << _TORCH_BITS:
        bits += 1
    whole = np.trunc(weights * (1 << bits) + np.copysign(0.5, weights)).astype(np.int32)
    shape = list(values.shape)
    shape[axis] = size
    total = np.full(shape, 1 << (bits - 1), np.int32)
    for tap in range(weights.shape[1]):
        positions = np.minimum(first + tap, before - 1)
        total += np.take(values, positions, axis) * _along(whole[:, tap], axis)
    return (total >> bits).clip(0, 255).astype(np.uint8)


def _averaging_weights(
    before: int, after: int, interpolation: Interpolation
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """For each new pixel: the first pixel that it reads, and the weights (after, taps) from there.

    When the picture shrinks, the weights reach over all pixels that the new one covers.
    """
    scale = before / after
    stretched = max(scale, 1.0)
    support = _REACH[interpolation] * stretched
    centres = scale * (np.arange(after) + 0.5)
    first = np.maximum((centres - support + 0.5).astype(np.intp), 0)
    end = np.minimum((centres + support + 0.5).astype(np.intp), before)
    taps = first[:, None] + np.arange(int((end - first).max()))
    d = np.abs(taps - centres[:, None] + 0.5) / stretched
    weights = np.maximum(0, 1 - d) if interpolation == "bilinear" else _cubic(d, _PILLOW_BICUBIC)
    weights = np.where(taps < end[:, None], weights, 0)
    return first, weights / weights.sum(axis=1, keepdims=True)


def _cubic(d: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    """Keys's kernel with the constant ``a`` at the distances ``d`` ≥ 0.

    Source: Keys 1981, doi:10.1109/TASSP.1981.1163711.
    """
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


def _along(weights: NDArray[Any], axis: int) -> NDArray[Any]:
    """``weights`` in a shape that multiplies along ``axis`` of (H, W, C)."""
    return weights[:, None, None] if axis == 0 else weights[None, :, None]
