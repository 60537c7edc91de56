"""Checks the parts of GIF, BMP and PPM files before a decoder sees them, for ``structure``.

Pillow reads many parts of these files in Python loops: a GIF's comments block by block, a
compressed BMP run by run, a PPM's header byte by byte. A file that would keep such a loop busy for
long is refused.

Sources: GIF89a specification; Microsoft BITMAPINFOHEADER; netpbm's ppm(5).
"""

import re
import struct

from registry.core.errors import InvalidImage
from registry.model.image.limits import DecodeLimits, check_size, count

# Bytes that introduce a GIF's blocks; a graphic control extension has the frame's transparency.
_EXTENSION, _FRAME, _CONTROL = 0x21, 0x2C, 0xF9
_CORE_HEADER = 12
_INFO_HEADERS = {40, 52, 56, 64, 108, 124}
_UNCOMPRESSED, _BIT_FIELDS = 0, 3
MAX_COLOURS = 256
MAX_HEADER_BYTES = 2_048
_BLANK = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PPM = re.compile(rb"P([1-6])" + _BLANK + rb"(\d{1,9})" + _BLANK + rb"(\d{1,9})\s")
_MAX_VALUE = re.compile(_BLANK + rb"(\d{1,5})\s")


def check_gif(data: bytes, limits: DecodeLimits) -> bytes:
    """``data`` without the blocks before its first frame, except that frame's transparency."""
    width_px, height_px, flags = struct.unpack_from("<HHB", data, 6)
    palette_end = position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    control, blocks = b"", 0
    while data[position] != _FRAME:
        start, label = position, data[position + 1]
        if data[position] != _EXTENSION:
            raise InvalidImage("the image cannot be decoded: the GIF has no frame")
        position += 2
        while length := data[position]:
            position += length + 1
            blocks = count(blocks, limits.max_parts, "blocks before its first frame")
        position += 1
        if label == _CONTROL:
            control = data[start:position]
    left, top, across, down = struct.unpack_from("<HHHH", data, position + 1)
    check_size((max(width_px, left + across), max(height_px, top + down)), limits, 1)
    return data[:palette_end] + control + data[position:]


def check_bmp(data: bytes, limits: DecodeLimits) -> bytes:
    """``data`` unchanged, after its header was checked. Compressed pixels are refused."""
    (header,) = struct.unpack_from("<I", data, 14)
    compression = colours = 0
    if header == _CORE_HEADER:
        width_px, height_px, _, bits = struct.unpack_from("<HHHH", data, 18)
    elif header in _INFO_HEADERS:
        width_px, height_px, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
        (colours,) = struct.unpack_from("<I", data, 46)
    else:
        raise InvalidImage(
            f"the image cannot be decoded: its BMP header has an unknown size of {header} bytes"
        )
    if compression not in (_UNCOMPRESSED, _BIT_FIELDS):
        raise InvalidImage(
            f"the image cannot be decoded: BMP compression {compression} is not accepted; "
            "save it uncompressed, or as PNG"
        )
    if bits <= 8 and colours > MAX_COLOURS:
        raise InvalidImage(
            f"the image cannot be decoded: the BMP has {colours:,} colours in its palette; "
            f"at most {MAX_COLOURS} are accepted"
        )
    check_size((width_px, abs(height_px)), limits, bits / 8)
    return data


def is_ppm(data: bytes) -> bool:
    """Whether ``data`` begins like one of the netpbm formats."""
    return _PPM.match(data, 0, MAX_HEADER_BYTES) is not None


def check_ppm(data: bytes, limits: DecodeLimits) -> bytes:
    """``data`` unchanged, after its header was checked.

    Only binary pixels are accepted, and only depths of 1, 8 or (grey) 16 bits.
    """
    found = _PPM.match(data, 0, MAX_HEADER_BYTES)
    assert found is not None
    kind, width_px, height_px = (int(each) for each in found.groups())
    if kind <= 3:
        raise InvalidImage(
            f"the image cannot be decoded: plain PPM (P{kind}) is not accepted; "
            f"save it as binary (P{kind + 3})"
        )
    depth = 1
    if kind > 4:
        top = _MAX_VALUE.match(data, found.end() - 1, MAX_HEADER_BYTES)
        largest = int(top[1]) if top else 0
        if largest != 255 and (kind, largest) != (5, 65535):
            raise InvalidImage(
                f"the image cannot be decoded: a PPM whose largest value is {largest} is not "
                "accepted; use 255, or 65535 for grey"
            )
        depth = 4 if largest > 255 else 1
    check_size((width_px, height_px), limits, depth)
    return data
