"""Reads the wire format of Protocol Buffers, without a copy and without building messages.

A parser that builds messages takes many times the memory of a file, and reads it before anyone can
look at it. This one yields one field at a time.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_SIZES = {FIXED64: 8, FIXED32: 4}
_LONGEST_VARINT = 10
_TAGS = 1 << 32

Field = tuple[int, int | memoryview]
"""The number of a field, and its value: an integer, or the bytes of a longer value."""


class Malformed(ValueError):
    """The bytes are not a message of Protocol Buffers."""


def fields(message: memoryview) -> Iterator[Field]:
    """The fields of ``message`` in order.

    Raises:
        Malformed: the message is truncated, or has a group, which no current message has.
    """
    at, end = 0, message.nbytes
    while at < end:
        key, at = _varint(message, at)
        if key >= _TAGS:  # engines drop the upper bits, and would read another field
            raise Malformed("a field's tag has more than 32 bits")
        number, kind = key >> 3, key & 7
        if number == 0:
            raise Malformed("a field has the number 0")
        if kind == VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == BYTES:
            size, at = _varint(message, at)
        elif kind in _SIZES:
            size = _SIZES[kind]
        else:
            raise Malformed(f"field {number} has the wire type {kind}")
        if size > end - at:
            raise Malformed(f"field {number} claims {size:,} bytes, and {end - at:,} follow")
        yield number, message[at : at + size]
        at += size


def varints(packed: memoryview) -> Iterator[int]:
    """The numbers of a packed field; raises ``Malformed`` if the last one is truncated."""
    at = 0
    while at < packed.nbytes:
        value, at = _varint(packed, at)
        yield value


def signed(value: int) -> int:
    """A varint as the signed 64-bit number that it stands for."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at ``at``, and the place after it."""
    value = 0
    for index in range(_LONGEST_VARINT):
        if at >= message.nbytes:
            raise Malformed("a number is truncated")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value & ((1 << 64) - 1), at
    raise Malformed("a number has more than ten bytes")
