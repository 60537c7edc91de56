"""Checks one tensor of an ONNX graph: its shape fits its bytes, and these are in the graph."""

import math
from collections.abc import Mapping, Sequence

from registry.core.errors import BundleInvalid
from registry.model.graphs.wire import Malformed, signed, varints

Fields = Mapping[int, Sequence[int | memoryview]]
"""The values of a message by the number of the field."""

MAX_VALUES = 1_000_000_000
MAX_AXES = 64
MAX_NAME_BYTES = 4096
MAX_CONSTANT_VALUES = 64  # a shape, repeats or pads; longer constants are weights
INT64 = 7
# Bytes of a value by ONNX's number of the data type.
VALUE_BYTES = {
    1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, INT64: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 14: 8, 15: 16,
    16: 2,
}  # fmt: skip
SHAPE, KIND, INT64_VALUES, NAME, RAW, EXTERNAL, PLACE = 1, 2, 7, 8, 9, 13, 14
LISTED = (4, 5, 6, INT64_VALUES, 10, 11)  # values outside of the raw bytes


def check_tensor(tensor: Fields) -> tuple[int, ...] | None:
    """Check a tensor.

    Returns:
        Its values, if they are few and int64; else None.

    Raises:
        BundleInvalid: its values are in another file, or their number does not fit its shape.
    """
    if EXTERNAL in tensor or any(tensor.get(PLACE, ())):
        raise BundleInvalid("the graph refers to other files")
    name = text_of(tensor, NAME)[:80]
    shape = numbers(tensor.get(SHAPE, ()), MAX_AXES + 1)
    count = math.prod(shape)
    if len(shape) > MAX_AXES or min(shape, default=1) < 0 or count > MAX_VALUES:
        raise BundleInvalid(f"tensor {name!r} claims the shape {shape[:8]}")
    kind = sum(numbers(tensor.get(KIND, ())[-1:], 1))
    raw = [each for each in tensor.get(RAW, ()) if isinstance(each, memoryview)]
    if raw and raw[-1].nbytes != count * VALUE_BYTES.get(kind, 0):
        raise BundleInvalid(
            f"tensor {name!r} has {raw[-1].nbytes:,} bytes, which do not fit its shape {shape[:8]}"
        )
    if not raw and count > _listed(tensor):
        raise BundleInvalid(f"tensor {name!r} has fewer values than its shape {shape[:8]}")
    if kind != INT64 or count > MAX_CONSTANT_VALUES:
        return None
    if raw:
        return tuple(raw[-1].cast("q")) if raw[-1].nbytes else ()
    return tuple(numbers(tensor.get(INT64_VALUES, ()), MAX_CONSTANT_VALUES))


def numbers(values: Sequence[int | memoryview], limit: int) -> list[int]:
    """The first ``limit`` numbers of a repeated field, packed or not."""
    found: list[int] = []
    for value in values:
        for each in [value] if isinstance(value, int) else varints(value):
            found.append(signed(each))
            if len(found) == limit:
                return found
    return found


def text_of(fields: Fields, number: int) -> str:
    """The text of a field; empty if there is none."""
    return "".join(texts_of(fields, number)[-1:])


def texts_of(fields: Fields, number: int) -> list[str]:
    """The texts of a repeated field; raises ``Malformed`` if one is too long to be a name."""
    values = fields.get(number, ())
    if any(isinstance(each, memoryview) and each.nbytes > MAX_NAME_BYTES for each in values):
        raise Malformed(f"a name has more than {MAX_NAME_BYTES:,} bytes")
    return [
        bytes(each).decode("utf-8", "replace") for each in values if isinstance(each, memoryview)
    ]


def _listed(tensor: Fields) -> int:
    """How many values stand outside of the raw bytes, at most: each has at least a byte."""
    return sum(
        1 if isinstance(each, int) else max(1, each.nbytes)
        for number in LISTED
        for each in tensor.get(number, ())
    )
