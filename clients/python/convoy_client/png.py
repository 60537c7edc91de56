"""Encodes pixels as PNG without loss, so that arrays need no imaging library."""

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# PNG specification (third edition), section 11.2.1.
GREY, RGB = 0, 2
COLOUR_TYPES = {1: GREY, 3: RGB}
# The fastest level. The picture crosses the network once and is not kept.
COMPRESSION_LEVEL = 1


def encode_png(pixels: bytes, width_px: int, height_px: int, channels: int) -> bytes:
    """A PNG from which every decoder returns exactly ``pixels``.

    Args:
        pixels: uint8, row by row, channels last: ``height_px * width_px * channels`` bytes.
        width_px: at least 1.
        height_px: at least 1.
        channels: 1 for grey, 3 for RGB.
    """
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, COLOUR_TYPES[channels], 0, 0, 0)
    row_bytes = width_px * channels
    # Each row begins with the number of its filter; 0 leaves the row unchanged.
    rows = b"".join(
        b"\x00" + pixels[start : start + row_bytes] for start in range(0, len(pixels), row_bytes)
    )
    compressed = zlib.compress(rows, COMPRESSION_LEVEL)
    chunks = _chunk(b"IHDR", header), _chunk(b"IDAT", compressed), _chunk(b"IEND", b"")
    return SIGNATURE + b"".join(chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )
