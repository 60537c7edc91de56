"""Resizes pictures in the ways of OpenCV and torch, which Pillow does not have."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from registry.model.manifest import Interpolation

Floats = NDArray[np.float32]
# OpenCV's and torch's constant of bicubic interpolation, and that of Pillow, which torch uses with
# antialiasing.
_BICUBIC, _PILLOW_BICUBIC = -0.75, -0.5
_REACH = {"bilinear": 1, "bicubic": 2, "lanczos": 4}
# With antialiasing, in pixels of the smaller picture.
_AVERAGING_REACH = {"bilinear": 1, "bicubic": 2}
MAX_WEIGHT_BITS = 22


def resize_plainly(
    pixels: NDArray[np.uint8], width_px: int, height_px: int, interpolation: Interpolation
) -> NDArray[np.uint8]:
    """``pixels`` in another size; each new pixel is made of the few that lie next to it.

    Args:
        pixels: uint8 (H, W, C).
        width_px: the new width.
        height_px: the new height.
        interpolation: ``nearest`` reads one pixel, ``bilinear`` 2 a side, ``bicubic`` 4, and
            ``lanczos`` 8. Beyond an edge, the pixel at the edge is read.

    Returns:
        uint8 (height_px, width_px, C).
    """
    height, width = pixels.shape[:2]
    if interpolation == "nearest":
        rows = np.minimum(np.arange(height_px) * (height / height_px), height - 1).astype(np.intp)
        columns = np.minimum(np.arange(width_px) * (width / width_px), width - 1).astype(np.intp)
        return np.ascontiguousarray(pixels[rows[:, None], columns])
    narrow = _sum(pixels, 1, width_px, interpolation)
    resized = _sum(narrow, 0, height_px, interpolation)
    return np.rint(resized).clip(0, 255).astype(np.uint8)


def resize_as_torch(
    pixels: NDArray[np.uint8], width_px: int, height_px: int, interpolation: Interpolation
) -> NDArray[np.uint8]:
    """``pixels`` in another size, with antialiasing as torch does it for 8-bit levels.

    Pillow computes the same sums with finer weights, so a few levels differ by one or two.

    Args:
        pixels: uint8 (H, W, C).
        width_px: the new width.
        height_px: the new height.
        interpolation: ``bilinear`` or ``bicubic``.

    Returns:
        uint8 (height_px, width_px, C).

    Source: ATen/native/cpu/UpSampleKernel.cpp of torch 2.13.
    """
    narrow = _sum_as_torch(pixels, 1, width_px, interpolation)
    return _sum_as_torch(narrow, 0, height_px, interpolation)


def _sum_as_torch(
    values: NDArray[np.uint8], axis: int, size: int, interpolation: Interpolation
) -> NDArray[np.uint8]:
    """``values`` resized along one axis, with weights of 16 bits and 8-bit results."""
    before = values.shape[axis]
    if before == size:
        return values
    first, weights = _averaging_weights(before, size, interpolation)
    bits = 0
    while bits < MAX_WEIGHT_BITS and int(0.5 + weights.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    whole = np.trunc(weights * (1 << bits) + np.copysign(0.5, weights)).astype(np.int32)
    shape = [1, 1, 1]
    shape[axis] = size
    total: NDArray[np.int32] | None = None
    for tap in range(weights.shape[1]):
        positions = np.minimum(first + tap, before - 1)
        part = np.take(values, positions, axis) * whole[:, tap].reshape(shape)
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None
    total += 1 << (bits - 1)
    return (total >> bits).clip(0, 255).astype(np.uint8)


def _averaging_weights(
    before: int, after: int, interpolation: Interpolation
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """For each new pixel: the first pixel that it reads, and the weights (after, taps) from there.

    When the picture shrinks, the weights reach over all pixels that the new one covers.
    """
    scale = before / after
    stretched = max(scale, 1.0)
    support = _AVERAGING_REACH[interpolation] * stretched
    centres = scale * (np.arange(after) + 0.5)
    first = np.maximum((centres - support + 0.5).astype(np.intp), 0)
    end = np.minimum((centres + support + 0.5).astype(np.intp), before)
    taps = first[:, None] + np.arange(int((end - first).max()))
    distances = (taps - centres[:, None] + 0.5) / stretched
    weights = np.where(taps < end[:, None], _averaging_weight(distances, interpolation), 0)
    return first, weights / weights.sum(axis=1, keepdims=True)


def _averaging_weight(
    distance: NDArray[np.float64], interpolation: Interpolation
) -> NDArray[np.float64]:
    """The weight of a pixel at ``distance`` new pixels; the filters are those of Pillow."""
    d = np.abs(distance)
    return np.maximum(0, 1 - d) if interpolation == "bilinear" else _cubic(d, _PILLOW_BICUBIC)


def _sum(values: NDArray[np.generic], axis: int, size: int, interpolation: Interpolation) -> Floats:
    """``values`` resized along one axis, float32."""
    shape = [1, 1, 1]
    shape[axis] = size
    total: Floats | None = None
    for positions, weights in _taps(values.shape[axis], size, interpolation):
        part = np.take(values, positions, axis).astype(np.float32) * weights.reshape(shape)
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None
    return total


def _taps(
    before: int, after: int, interpolation: Interpolation
) -> Iterator[tuple[NDArray[np.intp], Floats]]:
    """For each pixel that is read: its position and its weight, of every new pixel."""
    centres = (np.arange(after) + 0.5) * (before / after) - 0.5
    left = np.floor(centres)
    fraction = centres - left
    reach = _REACH[interpolation]
    weights = [_weight(fraction - place, interpolation) for place in range(1 - reach, reach + 1)]
    total = np.sum(weights, axis=0)  # 1, apart from Lanczos's window
    for place, weight in zip(range(1 - reach, reach + 1), weights, strict=True):
        positions = np.clip(left + place, 0, before - 1).astype(np.intp)
        yield positions, (weight / total).astype(np.float32)


def _weight(distance: NDArray[np.float64], interpolation: Interpolation) -> NDArray[np.float64]:
    """The weight of a pixel at ``distance`` pixels from a new one."""
    d = np.abs(distance)
    weight: NDArray[np.float64]
    if interpolation == "bilinear":
        weight = np.maximum(0, 1 - d)
    elif interpolation == "lanczos":
        weight = np.where(d < 4, np.sinc(d) * np.sinc(d / 4), 0)
    else:
        weight = _cubic(d, _BICUBIC)
    return weight


def _cubic(d: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    """Keys's kernel with the constant ``a`` at the distances ``d`` ≥ 0 (doi 10.1109/TASSP.1981)."""
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


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
