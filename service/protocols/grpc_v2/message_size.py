"""Bounds what a ``ModelInferRequest`` takes in memory, before protobuf parses it.

Protobuf makes an object for each element of a repeated member: 24 MB of empty ``inputs`` took
1.1 GB. So only the images themselves may be large.
Source: protobuf.dev/programming-guides/encoding.
"""

from collections import Counter
from collections.abc import Iterator

from registry.core.errors import InvalidTensor

MAX_HEAD_BYTES = 64 * 1024
"""The most bytes of all members that are not image data; also of a whole message of other calls."""

# What the members of each kind of message are, by their numbers in inference.proto. The others are
# part of the head, or of the typed values of ``contents``.
_MEMBERS = {
    "request": {5: "tensor", 7: "image"},
    "tensor": {5: "contents"},
    "contents": {8: "image"},
}
_VARINT, _BYTES = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}


def check_infer_request(data: bytes, max_typed_bytes: int) -> None:
    """Check the sizes of the members of an encoded ``ModelInferRequest``.

    Args:
        data: the encoded message.
        max_typed_bytes: the most bytes of numbers in ``contents``.

    Raises:
        InvalidTensor: the message has too many bytes that are not image data, or is malformed.
    """
    limits = {"head": MAX_HEAD_BYTES, "typed": max_typed_bytes}
    sizes: Counter[str] = Counter()
    try:
        for part, size in _parts(data, 0, len(data), "request"):
            sizes[part] += size
            if sizes[part] > limits[part]:
                raise InvalidTensor(
                    f"the message has more than {limits[part]:,} bytes that are not image data; "
                    "send images or tensors as raw_input_contents"
                )
    except IndexError:
        raise InvalidTensor("the message is not a ModelInferRequest") from None


def _parts(data: bytes, at: int, end: int, message: str) -> Iterator[tuple[str, int]]:
    """The bytes of each member between ``at`` and ``end``, as part of the head or typed values.

    Raises:
        IndexError: the message is malformed.
    """
    other = "typed" if message == "contents" else "head"
    while at < end:
        began = at
        tag, at = _varint(data, at)
        if (wire_type := tag & 7) == _BYTES:
            size, at = _varint(data, at)
        elif wire_type == _VARINT:
            size = _varint(data, at)[1] - at
        else:
            size = _FIXED_BYTES.get(wire_type, end)
        if at + size > end:
            raise IndexError
        kind = _MEMBERS[message].get(tag >> 3, other) if wire_type == _BYTES else other
        yield other, at - began
        if kind in _MEMBERS:
            yield from _parts(data, at, at + size, kind)
        elif kind != "image":
            yield kind, size
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at ``at``, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift >= 70:
            raise IndexError
