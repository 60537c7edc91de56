"""Checks the structure of an encoded picture before any decoder sees its bytes.

Decoders trust a file's structure. In a JPEG of 94 KB, each of 5,000 repeated scans goes over all
pixels, which takes 18 s. Pillow skips 4 MB of padding byte by byte in a Python loop. A header may
claim any size. So this module walks the parts of a file from length to length, with searches that
run in C, and refuses a file with more parts than pictures have. It drops parts that do not affect
pixels, such as texts and colour profiles, if a decoder would unpack them. It does not use Pillow
and decodes nothing.

Sources: ITU-T T.81 annex B (JPEG), W3C PNG (third edition), RFC 9649 (WebP).
"""

import re
import struct
from collections.abc import Callable

from msgspec import Struct

from registry.core.errors import ImageTooLarge, InvalidImage, UnsupportedImageType
from registry.model.image.limits import MAX_PASSES, DecodeLimits, check_decoded, check_size, count
from registry.model.image.plain_structure import check_bmp, check_gif, check_ppm, is_ppm
from registry.model.image.tiff_structure import check_tiff

ACCEPTED = "JPEG, PNG, WebP, GIF, BMP, TIFF or PPM"

# Encoders write a PNG's pixels in chunks of 8 KB.
MAX_DATA_CHUNKS = 10_000
# Padding between a JPEG's markers. Some encoders align markers by a few bytes.
MAX_PADDING_BYTES = 4_096
# A search blocks all Python threads. Through so many bytes it takes 17 ms at most.
WINDOW_BYTES = 1_000_000
# Pillow holds the canvas of a WebP more than once.
WEBP_BYTES_PER_PIXEL = 6
MAX_COMPONENTS = 4
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}

_FILL = re.compile(rb"\xff+")
# In a scan, only 0 or a restart marker may follow 0xFF. Any other byte after it ends the scan.
_SCAN_ENDS = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SCAN = b"\xff\xda"
_SOS, _EOI, _TEM, _PROGRESSIVE = 0xDA, 0xD9, 0x01, 0xC2
_ALONE = {_TEM, *range(0xD0, 0xD9)}  # markers without a length
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame: has the size
_DECODED_FRAMES = {0xC0, 0xC1, _PROGRESSIVE}
# Kept in addition to the chunks that a PNG decoder needs, whose names begin with a capital.
_KEPT_CHUNKS = {b"tRNS", b"eXIf"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def check_parts(data: bytes, limits: DecodeLimits) -> bytes:
    """The bytes to decode, after a check that they are safe to give to a decoder.

    Args:
        data: the whole file.
        limits: what the file may claim and contain.

    Returns:
        ``data`` without some parts that do not affect its pixels.

    Raises:
        UnsupportedImageType: the file is not of an accepted format.
        ImageTooLarge: the file has, or claims, more than ``limits`` allow.
        InvalidImage: the file's structure is broken, or it is a variant of its format that is not
            accepted, such as BigTIFF.
    """
    check = _checker(data)
    if check is None:
        raise UnsupportedImageType(_what_it_is(data))
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(
            f"the image has {len(data):,} bytes; at most {limits.max_bytes:,} are accepted"
        )
    try:
        return check(data, limits)
    except (struct.error, IndexError) as error:
        raise InvalidImage(
            "the image cannot be decoded: it ends in the middle of its structure"
        ) from error


def _checker(data: bytes) -> Callable[[bytes, DecodeLimits], bytes] | None:
    if data.startswith(b"\xff\xd8\xff"):
        return _check_jpeg
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _check_png
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _check_webp
    if data.startswith((b"GIF87a", b"GIF89a")):
        return check_gif
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return check_tiff
    if data.startswith(b"BM"):
        return check_bmp
    return check_ppm if is_ppm(data) else None


def _what_it_is(data: bytes) -> str:
    """An error message for ``data``, whose format is not accepted."""
    name = None
    if data[4:8] == b"ftyp":
        brands = {data[at : at + 4] for at in range(8, 64, 4)}
        name = "an AVIF" if b"avif" in brands else "a HEIC" if brands & _HEIC else None
    if name is None:
        return f"the body is not a {ACCEPTED} image"
    return f"the body is {name} image; convert it to {ACCEPTED}"


class _Frame(Struct, frozen=True):
    """A JPEG's size in pixels, and its samples: number of a component → how many it has."""

    size: tuple[int, int]
    samples: dict[int, int]
    progressive: bool

    @classmethod
    def read(cls, data: bytes, position: int, marker: int) -> "_Frame":
        """The frame in the segment of ``marker`` whose length field is at ``position``."""
        if marker not in _DECODED_FRAMES:
            raise InvalidImage(
                f"the image cannot be decoded: its JPEG process (SOF{marker - 0xC0}) is neither "
                "baseline nor progressive with Huffman codes; save it as baseline JPEG"
            )
        height_px, width_px, number = struct.unpack_from(">HHB", data, position + 3)
        if not 1 <= number <= MAX_COMPONENTS:
            raise InvalidImage(
                f"the image cannot be decoded: its JPEG has {number} components; "
                f"1 to {MAX_COMPONENTS} are accepted"
            )
        components = [
            (data[at], data[at + 1] >> 4, data[at + 1] & 15)
            for at in range(position + 8, position + 8 + 3 * number, 3)
        ]
        if not all(1 <= h <= 4 and 1 <= v <= 4 for _, h, v in components):
            raise InvalidImage(
                "the image cannot be decoded: its JPEG has sampling factors outside 1 … 4"
            )
        across = max(h for _, h, _ in components) * 8
        down = max(v for _, _, v in components) * 8
        units = -(-width_px // across) * -(-height_px // down)  # decoders decode whole blocks
        samples = {name: units * 64 * h * v for name, h, v in components}
        return cls((width_px, height_px), samples, marker == _PROGRESSIVE)

    @property
    def all_samples(self) -> int:
        return sum(self.samples.values())

    def of_scan(self, data: bytes, position: int) -> int:
        """Number of samples in the scan whose length field is at ``position``."""
        end = position + 3 + 2 * data[position + 2]
        return sum(self.samples.get(data[at], 0) for at in range(position + 3, end, 2))


def _check_jpeg(data: bytes, limits: DecodeLimits) -> bytes:
    """``data`` unchanged, after its markers were checked up to the first scan.

    The rest is checked only if there may be many scans.
    """
    position, parts, padding, frame = 2, 0, 0, None
    while True:
        found = _FILL.search(data, position, position + MAX_PADDING_BYTES + 2)
        padding += (found.end() if found else position + MAX_PADDING_BYTES + 2) - position - 1
        if padding > MAX_PADDING_BYTES and len(data) > position + MAX_PADDING_BYTES:
            raise ImageTooLarge(
                f"the JPEG has more than {MAX_PADDING_BYTES} bytes of padding before its pixels"
            )
        if found is None:
            raise InvalidImage("the image cannot be decoded: the JPEG has no scan")
        marker, position = data[found.end()], found.end() + 1
        parts = count(parts, limits.max_parts, "markers")
        if marker == 0 or marker in _ALONE:
            continue
        if marker in _FRAMES:
            frame = _Frame.read(data, position, marker)
            check_size(frame.size, limits)
        if marker == _SOS:
            break
        position += struct.unpack_from(">H", data, position)[0]
    if frame is None:
        raise InvalidImage(
            "the image cannot be decoded: the JPEG has no size before its first scan"
        )
    max_samples = MAX_PASSES * limits.max_decoded_bytes
    if frame.progressive or data[position + 2] < len(frame.samples):
        # The decoder holds all coefficients until the last scan.
        check_decoded(frame.all_samples, frame.size, limits)
    # The count includes scans of thumbnails and of bytes after the picture. If it is too high, walk
    # the picture's own scans.
    scans = _count_scans(data)
    if scans > limits.max_scans or scans * frame.all_samples > max_samples:
        _check_scans(data, position, parts, frame, limits)
    return data


def _count_scans(data: bytes) -> int:
    """How many byte pairs in ``data`` look like the start of a scan."""
    return sum(
        data.count(_SCAN, start, start + WINDOW_BYTES + 1)
        for start in range(0, len(data), WINDOW_BYTES)
    )


def _check_scans(
    data: bytes, position: int, parts: int, frame: _Frame, limits: DecodeLimits
) -> None:
    """Check the scans from the first one on, whose length field is at ``position``."""
    scans, samples, marker = 0, 0, _SOS
    max_samples = MAX_PASSES * limits.max_decoded_bytes
    while True:
        if marker == _SOS:
            scans = count(scans, limits.max_scans, "scans")
            samples += frame.of_scan(data, position)
            if scans > 1 and samples > max_samples:
                raise ImageTooLarge(
                    f"the JPEG's first {scans} scans have {samples:,} samples; "
                    f"at most {max_samples:,} are accepted; save it as baseline JPEG"
                )
        if marker not in _ALONE:
            position += struct.unpack_from(">H", data, position)[0]
        end = _end_of_scan(data, position)
        if end is None or data[end - 1] == _EOI:
            return
        marker, position = data[end - 1], end
        parts = count(parts, limits.max_parts, "markers")


def _end_of_scan(data: bytes, position: int) -> int | None:
    """Position after the next marker that ends a scan; None if there is none."""
    for start in range(position, len(data), WINDOW_BYTES):
        if found := _SCAN_ENDS.search(data, start, start + WINDOW_BYTES + 1):
            return found.end()
    return None


def _check_png(data: bytes, limits: DecodeLimits) -> bytes:
    """``data`` without the chunks that do not affect its pixels."""
    if data[12:16] != b"IHDR":
        raise InvalidImage("the image cannot be decoded: the PNG does not begin with its header")
    width_px, height_px, bits, kind = struct.unpack_from(">IIBB", data, 16)
    if kind not in PNG_CHANNELS:
        raise InvalidImage(
            f"the image cannot be decoded: the PNG has an unknown colour type {kind}"
        )
    check_size((width_px, height_px), limits, PNG_CHANNELS[kind] * bits / 8)
    start, parts, pixels, kept = 0, 0, 0, list[bytes]()
    position = 8
    while position < len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + length + 12
        if name == b"IDAT":
            pixels = count(pixels, MAX_DATA_CHUNKS, "chunks of pixels")
        else:
            parts = count(parts, limits.max_parts, "chunks")
            if name[:1].islower() and name not in _KEPT_CHUNKS:
                kept.append(data[start:position])
                start = end
        position = end
        if name == b"IEND":
            break
    return b"".join([*kept, data[start:position]]) if kept else data


def _check_webp(data: bytes, limits: DecodeLimits) -> bytes:
    """``data`` unchanged, after its size and its chunks were checked."""
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width_px, height_px = struct.unpack_from("<HH", data, 26)
        size = width_px & 0x3FFF, height_px & 0x3FFF
    elif kind == b"VP8L" and data[20:21] == b"\x2f":
        (bits,) = struct.unpack_from("<I", data, 21)
        size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        sides = struct.unpack("<II", data[24:27] + b"\0" + data[27:30] + b"\0")
        size = sides[0] + 1, sides[1] + 1
    else:
        raise InvalidImage("the image cannot be decoded: the WebP does not begin with its header")
    check_size(size, limits, WEBP_BYTES_PER_PIXEL)
    position, parts = 12, 0
    while position + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, position + 4)
        position += 8 + length + length % 2
        parts = count(parts, limits.max_parts, "chunks")
    return data
