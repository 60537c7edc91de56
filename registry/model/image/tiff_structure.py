"""Checks the parts of a TIFF file before a decoder sees them, for ``structure``.

A directory may point to other directories and to itself, and each of its entries to megabytes, even
all to the same ones. So decoders get a new directory with only the few entries that describe the
pixels; it points to no other directory. JPEG, fax and other compressions inside TIFF are refused,
because this check cannot bound the work of their decoders.

Source: TIFF 6.0; Adobe Photoshop TIFF technical notes (deflate).
"""

import struct

from registry.core.errors import ImageTooLarge, InvalidImage
from registry.model.image.limits import DecodeLimits, check_size, count

MAX_STRIPS = 10_000
MAX_VALUES = 8
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES = 256, 257, 258, 259, 277
_COLOURS, _TILE_WIDTH, _TILE_HEIGHT = 320, 322, 323
# Tag → the most values that its entry may have. Only entries with these tags are kept.
_KEPT = {
    **dict.fromkeys((_WIDTH, _HEIGHT, _COMPRESSION, _SAMPLES, _TILE_WIDTH, _TILE_HEIGHT), 1),
    **dict.fromkeys((262, 266, 274, 278, 284, 317), 1),  # photometric … predictor
    **dict.fromkeys((_BITS, 338, 339), MAX_VALUES),  # extra samples, sample format
    **dict.fromkeys((273, 279, 324, 325), MAX_STRIPS),  # offsets and sizes of strips or tiles
    _COLOURS: 3 * 256,
}
_TYPES = {1: "B", 3: "H", 4: "I"}
_COMPRESSIONS = {1, 5, 8, 32773, 32946}  # none, LZW, deflate, PackBits, deflate's first number


class _Entry:
    """One entry of a TIFF directory."""

    def __init__(self, data: bytes, order: str, position: int) -> None:
        self.raw = data[position : position + 12]
        self.tag, kind, self.count = struct.unpack_from(order + "HHI", data, position)
        self._format = _TYPES.get(kind)
        self._data, self._order = data, order

    @property
    def is_kept(self) -> bool:
        return self.tag in _KEPT and self._format is not None

    def values(self) -> tuple[int, ...]:
        """The entry's numbers; ``struct.error`` if they lie outside the file."""
        form = f"{self._order}{self.count}{self._format}"
        if struct.calcsize(form) <= 4:
            return struct.unpack_from(form, self.raw, 8)
        (offset,) = struct.unpack_from(self._order + "I", self.raw, 8)
        return struct.unpack_from(form, self._data, offset)


def check_tiff(data: bytes, limits: DecodeLimits) -> bytes:
    """``data`` with one new directory: only the entries that the first picture needs."""
    if data[2:4] in (b"+\0", b"\0+"):
        raise InvalidImage(
            "the image cannot be decoded: BigTIFF is not accepted; save it as classic TIFF"
        )
    order = "<" if data[:1] == b"I" else ">"
    entries = _read_directory(data, order, limits)
    _check_pixels(entries, limits)
    directory = struct.pack(order + "H", len(entries))
    directory += b"".join(entries[tag].raw for tag in sorted(entries)) + bytes(4)
    padding = bytes(len(data) % 2)
    start = struct.pack(order + "I", len(data) + len(padding))
    return b"".join([data[:4], start, data[8:], padding, directory])


def _read_directory(data: bytes, order: str, limits: DecodeLimits) -> dict[int, _Entry]:
    (position,) = struct.unpack_from(order + "I", data, 4)
    (number,) = struct.unpack_from(order + "H", data, position)
    entries: dict[int, _Entry] = {}
    for index in range(number):
        count(index, limits.max_parts, "entries in its directory")
        entry = _Entry(data, order, position + 2 + 12 * index)
        if entry.is_kept and entry.tag not in entries:
            if entry.count > _KEPT[entry.tag]:
                raise ImageTooLarge(
                    f"the TIFF has {entry.count:,} values of tag {entry.tag}; "
                    f"at most {_KEPT[entry.tag]:,} are accepted"
                )
            entries[entry.tag] = entry
    return entries


def _check_pixels(entries: dict[int, _Entry], limits: DecodeLimits) -> None:
    def value(tag: int, default: int) -> int:
        found = entries[tag].values() if tag in entries else ()
        return max(found, default=default)

    compression = value(_COMPRESSION, 1)
    if compression not in _COMPRESSIONS:
        raise InvalidImage(
            f"the image cannot be decoded: TIFF compression {compression} is not accepted; "
            "save it uncompressed, with LZW, deflate or PackBits, or as PNG"
        )
    if value(_SAMPLES, 1) > MAX_VALUES:
        raise InvalidImage(
            f"the image cannot be decoded: its TIFF has {value(_SAMPLES, 1)} samples a pixel; "
            f"at most {MAX_VALUES} are accepted"
        )
    bytes_per_pixel = value(_SAMPLES, 1) * value(_BITS, 1) / 8
    check_size((value(_WIDTH, 0), value(_HEIGHT, 0)), limits, bytes_per_pixel)
    if _TILE_WIDTH in entries:  # a decoder holds a whole tile, whatever the picture's size
        check_size((value(_TILE_WIDTH, 0), value(_TILE_HEIGHT, 0)), limits, bytes_per_pixel)
