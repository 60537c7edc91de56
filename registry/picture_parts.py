"""What an encoded picture is made of, read from its bytes before any decoder sees them.

Decoders trust a file's structure: of a JPEG of 94 KB each of 5,000 repeated scans goes over all
pixels, for 18 s; 4 MB of padding are skipped in a loop of Python's, byte by byte; a header claims
any size. So the parts are walked here, from length to length and by scans of C's speed, and a file
that has more of anything than pictures have is refused. Knows no Pillow; decodes nothing.

Sources: ITU-T T.81 annex B (JPEG), W3C PNG (third edition), RFC 9649 (WebP).
"""

import re
import struct
from collections.abc import Callable

from msgspec import Struct

from registry.errors import ImageTooLarge, InvalidImage, UnsupportedImageType


class DecodeLimits(Struct, frozen=True):
    """What a picture may claim, and consist of, before a single pixel of it is decoded.

    Attributes:
        max_pixels: width times height.
        max_aspect: the longer side by the shorter one.
        max_scans: of a JPEG; progressive ones have about ten.
        max_parts: markers of a JPEG, chunks of a PNG or WebP, but for a PNG's pixel data.
        max_packed: compressed texts and colour profiles of a PNG, which unpack to a thousand times
            their size.
    """

    max_pixels: int = 12_000_000
    max_aspect: float = 50.0
    max_scans: int = 64
    max_parts: int = 1_000
    max_packed: int = 32


# Programs write a PNG's pixels in pieces of 8 KB.
MOST_DATA_CHUNKS = 10_000
# Bytes between a JPEG's markers that mean nothing; some writers align by a few.
MOST_PADDING_BYTES = 4_096

_FILL = re.compile(rb"\xff+")
# In a scan 0xFF stands before 0 and restart markers only; what else follows it ends the scan.
_SCAN_ENDS = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOS, _EOI, _TEM = 0xDA, 0xD9, 0x01
_ALONE = {_TEM, *range(0xD0, 0xD9)}  # markers without a length
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame: has the size
_PACKED = {b"zTXt", b"iTXt", b"iCCP"}


def check_parts(data: bytes, limits: DecodeLimits) -> None:
    """Refuse what no decoder should be given.

    Args:
        data: the whole file.
        limits: what it may claim and consist of.

    Raises:
        UnsupportedImageType: it starts like no JPEG, PNG or WebP.
        ImageTooLarge: it has, or claims, more than ``limits`` allow.
        InvalidImage: its parts do not follow each other as they must.
    """
    check = _checker(data)
    if check is None:
        raise UnsupportedImageType("the body is not a JPEG, PNG or WebP image")
    try:
        check(data, limits)
    except (struct.error, IndexError) as error:
        raise InvalidImage(
            "the image cannot be decoded: it ends in the middle of its structure"
        ) from error


def starts_like_served(data: bytes) -> bool:
    """Whether the bytes start like a format that ``check_parts`` knows."""
    return _checker(data) is not None


def check_size(size: tuple[int, int], limits: DecodeLimits) -> None:
    """Refuse a width and height, in pixels, that are none, or more than ``limits`` allow."""
    width_px, height_px = size
    if min(size) < 1:
        raise InvalidImage(f"the image is {width_px}×{height_px} pixels: it has none")
    if width_px * height_px > limits.max_pixels:
        raise ImageTooLarge(
            f"the image is {width_px}×{height_px} = {width_px * height_px:,} pixels; "
            f"at most {limits.max_pixels:,} are accepted"
        )
    # Resizing the shorter side of a 60000×1 strip would need gigabytes.
    if max(size) > limits.max_aspect * min(size):
        raise ImageTooLarge(
            f"the image is {width_px}×{height_px} pixels; "
            f"the longer side may be at most {limits.max_aspect:g} times the shorter"
        )


def _checker(data: bytes) -> Callable[[bytes, DecodeLimits], None] | None:
    if data.startswith(b"\xff\xd8\xff"):
        return _check_jpeg
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _check_png
    return _check_webp if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _check_jpeg(data: bytes, limits: DecodeLimits) -> None:
    """Walk the markers up to the first scan, and beyond it if there may be many scans."""
    position, parts, padding, sized = 2, 0, 0, False
    while True:
        found = _FILL.search(data, position)
        if found is None:
            raise InvalidImage("the image cannot be decoded: the JPEG has no scan")
        padding += found.end() - position - 1
        if padding > MOST_PADDING_BYTES:
            raise ImageTooLarge(
                f"the JPEG has more than {MOST_PADDING_BYTES} bytes of padding before its pixels"
            )
        marker, position = data[found.end()], found.end() + 1
        parts = _count(parts, limits.max_parts, "markers")
        if marker == 0 or marker in _ALONE:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        if marker in _FRAMES:
            height_px, width_px = struct.unpack_from(">HH", data, position + 3)
            check_size((width_px, height_px), limits)
            sized = True
        if marker == _SOS:
            break
        position += length
    if not sized:
        raise InvalidImage(
            "the image cannot be decoded: its size does not stand before its first scan"
        )
    # What follows the picture, and thumbnails, may have some too: only then it is worth a walk.
    if data.count(b"\xff\xda") > limits.max_scans:
        _check_scans(data, position, parts, limits)


def _check_scans(data: bytes, position: int, parts: int, limits: DecodeLimits) -> None:
    scans = 1
    while found := _SCAN_ENDS.search(data, position):
        marker, position = data[found.end() - 1], found.end()
        if marker == _EOI:
            return
        parts = _count(parts, limits.max_parts, "markers")
        if marker == _SOS:
            scans = _count(scans, limits.max_scans, "scans")
        if marker not in _ALONE:
            position += struct.unpack_from(">H", data, position)[0]


def _check_png(data: bytes, limits: DecodeLimits) -> None:
    if data[12:16] != b"IHDR":
        raise InvalidImage("the image cannot be decoded: the PNG does not begin with its header")
    check_size(struct.unpack_from(">II", data, 16), limits)
    position, parts, packed, pixels = 8, 0, 0, 0
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        position += length + 12
        if kind == b"IDAT":
            pixels = _count(pixels, MOST_DATA_CHUNKS, "chunks of pixels")
            continue
        parts = _count(parts, limits.max_parts, "chunks")
        if kind in _PACKED:
            packed = _count(packed, limits.max_packed, "compressed texts and profiles")
        elif kind == b"IEND":
            return


def _check_webp(data: bytes, limits: DecodeLimits) -> None:
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width_px, height_px = struct.unpack_from("<HH", data, 26)
        check_size((width_px & 0x3FFF, height_px & 0x3FFF), limits)
    elif kind == b"VP8L" and data[20:21] == b"\x2f":
        (bits,) = struct.unpack_from("<I", data, 21)
        check_size(((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1), limits)
    elif kind == b"VP8X":
        sides = struct.unpack("<II", data[24:27] + b"\0" + data[27:30] + b"\0")
        check_size((sides[0] + 1, sides[1] + 1), limits)
    else:
        raise InvalidImage("the image cannot be decoded: the WebP does not begin with its header")
    position, parts = 12, 0
    while position + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, position + 4)
        position += 8 + length + length % 2
        parts = _count(parts, limits.max_parts, "chunks")


def _count(number: int, limit: int, what: str) -> int:
    """One more; ``ImageTooLarge`` when that is one too many."""
    if number >= limit:
        raise ImageTooLarge(f"the image has more than {limit:,} {what}")
    return number + 1
