"""The tensors of the protocol: what a version takes and gives, and how their bytes are laid out."""

import contextlib
import math
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from registry.core.errors import ConvoyError, InvalidTensor
from registry.model.manifest import PreprocessSpec
from service.http.bodies.base64_text import LARGE_JSON_BYTES
from service.http.bodies.reading import too_large
from service.inference.requests import InputImage

ENCODED, PIXELS, NORMALISED = "BYTES", "UINT8", "FP32"
PROBABILITIES, LABELS = "probabilities", "labels"
DTYPES: dict[str, np.dtype[Any]] = {PIXELS: np.dtype("u1"), NORMALISED: np.dtype("<f4")}
_LENGTH = struct.Struct("<I")
MAX_SIDE = 4096
# A value takes at least a digit and a comma.
JSON_BYTES_PER_VALUE = 2
# Between two slices of a large tensor, so that the server's loop gets the interpreter.
PAUSE_S = 0.0001


class TensorSpec(Struct, frozen=True):
    """A tensor that a version takes or gives; -1 stands for any size."""

    name: str
    datatype: str
    shape: list[int]


class TensorHead(Struct, frozen=True):
    """The datatype and the checked shape of one input tensor."""

    datatype: str
    shape: tuple[int, ...]

    @property
    def images(self) -> int:
        """How many images the tensor has."""
        return self.shape[0]

    @property
    def values(self) -> int:
        """How many values the tensor has."""
        return math.prod(self.shape)


def input_specs(spec: PreprocessSpec) -> list[TensorSpec]:
    """The tensors that a version takes. They are alternatives: a request has one of them."""
    height_px, width_px, channels = spec.shape
    return [
        TensorSpec("image", ENCODED, [-1]),
        TensorSpec("pixels", PIXELS, [-1, height_px, width_px, channels]),
        TensorSpec("normalised", NORMALISED, [-1, channels, height_px, width_px]),
    ]


def output_specs(classes: int) -> list[TensorSpec]:
    """The tensors that a version of ``classes`` classes gives."""
    return [
        TensorSpec(PROBABILITIES, NORMALISED, [-1, classes]),
        TensorSpec(LABELS, ENCODED, [-1, -1]),
    ]


def checked_head(datatype: str, shape: Iterable[int], max_images: int) -> TensorHead:
    """The head of an input tensor.

    Raises:
        InvalidTensor: the datatype is not one of the three, the shape does not fit it, or the
            tensor has no image or more than ``max_images``.
    """
    head = TensorHead(datatype, tuple(shape))
    if datatype == ENCODED:
        if (len(head.shape) == 2 and head.shape[1] != 1) or len(head.shape) not in (1, 2):
            raise InvalidTensor(
                f"the shape of a BYTES tensor is {list(head.shape[:8])}; send [N] or [N, 1], with "
                "one encoded image for each element"
            )
    elif datatype in DTYPES:
        if len(head.shape) != 4:
            layout = "height, width, channels" if datatype == PIXELS else "channels, height, width"
            raise InvalidTensor(
                f"the shape of a {datatype} tensor is {list(head.shape[:8])}; send [N, {layout}]"
            )
    else:
        raise InvalidTensor(
            f"the datatype {datatype[:40]!r} is not accepted; send BYTES (encoded images), UINT8 "
            "(pixels) or FP32 (normalised values)"
        )
    if not 1 <= head.images <= max_images:
        raise InvalidTensor(f"the tensor has {head.images} images; send 1 to {max_images}")
    if not all(1 <= side <= MAX_SIDE for side in head.shape[1:]):
        raise InvalidTensor(f"the shape {list(head.shape)} has a side outside of 1 to {MAX_SIDE}")
    return head


def images_from_bytes(
    head: TensorHead, data: memoryview, max_bytes: int
) -> Iterator[InputImage | ConvoyError]:
    """The images in the binary form of a tensor.

    Args:
        head: the tensor's head.
        data: its bytes, little-endian and row-major; for ``BYTES``, each element is its length in
            four bytes, and its bytes.
        max_bytes: the most bytes of an encoded image.

    Raises:
        InvalidTensor: the tensor has another size than ``head`` says.
    """
    if head.datatype == ENCODED:
        yield from _elements(head.images, data, max_bytes)
        return
    dtype = DTYPES[head.datatype]
    if data.nbytes != head.values * dtype.itemsize:
        raise InvalidTensor(
            f"the tensor has {data.nbytes:,} bytes; its shape {list(head.shape)} and datatype "
            f"{head.datatype} need {head.values * dtype.itemsize:,}"
        )
    yield from np.frombuffer(data, dtype).reshape(head.shape)


def images_from_values(head: TensorHead, slices: Iterable[Sequence[float]]) -> NDArray[Any]:
    """The images of a tensor of numbers, from slices of its values, which are row-major.

    Iterating a slice and storing it holds the interpreter, for 0.2 s if a tensor has the 2 million
    values that JSON of 4 MiB can hold. This function therefore pauses between the slices of a large
    tensor, and the caller reads one large tensor at a time, by ``paced``.

    Args:
        head: the tensor's head. The caller has checked that it has not too many values.
        slices: slices of the values. They may be made while they are iterated.

    Raises:
        InvalidTensor: there are more or fewer values, or one does not fit the datatype.
    """
    values = np.empty(head.values, DTYPES[head.datatype])
    filled = 0
    is_large = JSON_BYTES_PER_VALUE * head.values > LARGE_JSON_BYTES
    for each in slices:
        if filled + len(each) <= head.values:
            values[filled : filled + len(each)] = _checked_values(head.datatype, each)
        filled += len(each)
        if is_large:
            time.sleep(PAUSE_S)
    if filled != head.values:
        raise InvalidTensor(
            f"the tensor has {filled:,} values; its shape {list(head.shape)} needs {head.values:,}"
        )
    return values.reshape(head.shape)


def _checked_values(datatype: str, values: Sequence[float]) -> NDArray[Any]:
    """Values of ``datatype``; raises ``InvalidTensor`` if one does not fit it."""
    if datatype == PIXELS:
        with contextlib.suppress(TypeError, ValueError):
            return np.frombuffer(bytes(values), np.uint8)  # type: ignore[arg-type]
    try:
        array = np.array(values, np.float64)
    except OverflowError:  # a whole number of hundreds of digits
        array = np.array([np.inf])
    if datatype == PIXELS and not (
        (array >= 0).all() and (array <= 255).all() and (array == np.rint(array)).all()
    ):
        raise InvalidTensor("a value of the UINT8 tensor is not a whole number from 0 to 255")
    with np.errstate(over="ignore"):  # infinity is refused later, as every value out of range
        return array.astype(DTYPES[datatype])


def bytes_tensor(elements: Iterable[bytes]) -> bytes:
    """The binary form of a ``BYTES`` tensor."""
    return b"".join(_LENGTH.pack(len(each)) + each for each in elements)


def _elements(number: int, data: memoryview, max_bytes: int) -> Iterator[bytes | ConvoyError]:
    """The elements of a ``BYTES`` tensor; one over ``max_bytes`` becomes an error."""
    at = 0
    for position in range(number):
        if data.nbytes - at < _LENGTH.size:
            raise InvalidTensor(
                f"the BYTES tensor ends before its element {position}; its shape needs {number}"
            )
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length > data.nbytes - at:
            raise InvalidTensor(
                f"element {position} of the BYTES tensor has {length:,} bytes, but only "
                f"{data.nbytes - at:,} follow"
            )
        yield bytes(data[at : at + length]) if length <= max_bytes else too_large(length, max_bytes)
        at += length
    if at != data.nbytes:
        raise InvalidTensor(
            f"{data.nbytes - at:,} bytes follow the last of the {number} elements of the tensor"
        )
