"""Turns a picture that the client has decoded, and perhaps normalised, into a network's pixels."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.core.errors import InvalidTensor
from registry.model.image.decode import Pixels
from registry.model.manifest import PreprocessSpec

# A value is refused if it lies farther than this outside the levels 0 to 255.
HALF_A_LEVEL = 0.5


def pixels_of(tensor: NDArray[Any], spec: PreprocessSpec) -> Pixels:
    """The pixels of one picture that the client has decoded.

    Args:
        tensor: uint8 pixels (height, width, channels), returned unchanged; or float32 values
            (channels, height, width), normalised as ``spec`` says: (level / 255 - mean) / std.
        spec: the preprocessing of the version that will classify the pixels.

    Returns:
        uint8 array of shape ``spec.shape``. A float becomes the nearest level.

    Raises:
        InvalidTensor: the tensor has another shape or dtype, or a value is NaN or more than half
            a level below 0 or above 255.
    """
    if tensor.dtype == np.uint8:
        _check_shape(tensor, spec.shape, "height, width, channels")
        return tensor
    if tensor.dtype == np.float32:
        height_px, width_px, channels = spec.shape
        _check_shape(tensor, (channels, height_px, width_px), "channels, height, width")
        return _denormalised(tensor, spec)
    raise InvalidTensor(f"the tensor has the dtype {tensor.dtype}; send uint8 or float32")


def _check_shape(tensor: NDArray[Any], wanted: tuple[int, int, int], meaning: str) -> None:
    if tensor.shape != wanted:
        raise InvalidTensor(
            f"a picture of the tensor has the shape {tensor.shape}; this version takes {wanted}: "
            f"{meaning}"
        )


def _denormalised(tensor: NDArray[np.float32], spec: PreprocessSpec) -> Pixels:
    """The nearest levels (height, width, channels) of normalised values."""
    mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (spec.mean, spec.std))
    with np.errstate(over="ignore", invalid="ignore"):  # such values are refused below
        levels = (tensor * std + mean) * np.float32(255)
    lowest, highest = float(levels.min()), float(levels.max())
    if not (lowest >= -HALF_A_LEVEL and highest <= 255 + HALF_A_LEVEL):  # also if one is NaN
        raise InvalidTensor(
            f"the values stand for the levels {lowest:.4g} to {highest:.4g}, and pixels have 0 to "
            f"255; send (level / 255 - mean) / std with mean {spec.mean} and std {spec.std}"
        )
    return np.ascontiguousarray(np.rint(levels).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
