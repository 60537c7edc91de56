"""What an encoded picture is made of, read from its bytes before any decoder sees them.

Decoders trust a file's structure: of a JPEG of 94 KB each of 5,000 repeated scans goes over all
pixels, for 18 s; 4 MB of padding are skipped in a loop of Python's, byte by byte; a header claims
any size. So the parts are walked here, from length to length and by scans of C's speed, and a file
that has more of anything than pictures have is refused. Parts that do not decide over pixels, such
as texts and colour profiles, are dropped where a decoder would unpack them. Knows no Pillow;
decodes nothing.

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

# Programs write a PNG's pixels in pieces of 8 KB.
MAX_DATA_CHUNKS = 10_000
# Bytes between a JPEG's markers that mean nothing; some writers align by a few.
MAX_PADDING_BYTES = 4_096
# A search holds the interpreter; through so many bytes, for 17 ms at most.
WINDOW_BYTES = 1_000_000
# Pillow lays the canvas of a WebP out more than once.
WEBP_BYTES_PER_PIXEL = 6
MAX_COMPONENTS = 4
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}

_FILL = re.compile(rb"\xff+")
# In a scan 0xFF stands before 0 and restart markers only; what else follows it ends the scan.
_SCAN_ENDS = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SCAN = b"\xff\xda"
_SOS, _EOI, _TEM, _PROGRESSIVE = 0xDA, 0xD9, 0x01, 0xC2
_ALONE = {_TEM, *range(0xD0, 0xD9)}  # markers without a length
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame: has the size
_DECODED_FRAMES = {0xC0, 0xC1, _PROGRESSIVE}
# Beside those without which no PNG can be read, which begin with a capital.
_KEPT_CHUNKS = {b"tRNS", b"eXIf"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def check_parts(data: bytes, limits: DecodeLimits) -> bytes:
    """Refuse what no decoder should be given.

    Args:
        data: the whole file.
        limits: what it may claim and consist of.

    Returns:
        What to decode: ``data``, without parts that decide nothing about its pixels.

    Raises:
        UnsupportedImageType: it is of no format that is accepted.
        ImageTooLarge: it has, or claims, more than ``limits`` allow.
        InvalidImage: its parts do not follow each other as they must, or it is of a kind of its
            format that is not accepted.
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
    """Why ``data``, of no accepted format, is refused."""
    name = None
    if data[4:8] == b"ftyp":
        brands = {data[at : at + 4] for at in range(8, 64, 4)}
        name = "an AVIF" if b"avif" in brands else "a HEIC" if brands & _HEIC else None
    if name is None:
        return f"the body is not a {ACCEPTED} image"
    return f"the body is {name} image, which is not accepted; convert it to {ACCEPTED}"


class _Frame(Struct, frozen=True):
    """A JPEG's size, and how many samples each of its components has, by the component's number."""

    size: tuple[int, int]
    samples: dict[int, int]
    progressive: bool

    @classmethod
    def read(cls, data: bytes, position: int, marker: int) -> "_Frame":
        """From the segment of ``marker`` whose length stands at ``position``."""
        if marker not in _DECODED_FRAMES:
            raise InvalidImage(
                f"the image cannot be decoded: its JPEG process (SOF{marker - 0xC0}) is neither "
                "baseline nor progressive with Huffman codes"
            )
        height_px, width_px, number = struct.unpack_from(">HHB", data, position + 3)
        if not 1 <= number <= MAX_COMPONENTS:
            raise InvalidImage(f"the image cannot be decoded: a JPEG of {number} components")
        components = [
            (data[at], data[at + 1] >> 4, data[at + 1] & 15)
            for at in range(position + 8, position + 8 + 3 * number, 3)
        ]
        if not all(1 <= h <= 4 and 1 <= v <= 4 for _, h, v in components):
            raise InvalidImage("the image cannot be decoded: its JPEG has odd sampling factors")
        across = max(h for _, h, _ in components) * 8
        down = max(v for _, _, v in components) * 8
        units = -(-width_px // across) * -(-height_px // down)  # whole blocks are decoded
        samples = {name: units * 64 * h * v for name, h, v in components}
        return cls((width_px, height_px), samples, marker == _PROGRESSIVE)

    @property
    def all_samples(self) -> int:
        return sum(self.samples.values())

    def of_scan(self, data: bytes, position: int) -> int:
        """Samples of the components of the scan whose length stands at ``position``."""
        end = position + 3 + 2 * data[position + 2]
        return sum(self.samples.get(data[at], 0) for at in range(position + 3, end, 2))


def _check_jpeg(data: bytes, limits: DecodeLimits) -> bytes:
    """Walk the markers up to the first scan, and beyond it if there may be many scans."""
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
            "the image cannot be decoded: its size does not stand before its first scan"
        )
    max_samples = MAX_PASSES * limits.max_decoded_bytes
    if frame.progressive or data[position + 2] < len(frame.samples):
        # Its coefficients are held until the last scan.
        check_decoded(frame.all_samples, frame.size, limits)
    # What follows the picture, and thumbnails, may have some too: only then it is worth a walk.
    scans = _count_scans(data)
    if scans > limits.max_scans or scans * frame.all_samples > max_samples:
        _check_scans(data, position, parts, frame, limits)
    return data


def _count_scans(data: bytes) -> int:
    """Of all that looks like the start of a scan."""
    return sum(
        data.count(_SCAN, start, start + WINDOW_BYTES + 1)
        for start in range(0, len(data), WINDOW_BYTES)
    )


def _check_scans(
    data: bytes, position: int, parts: int, frame: _Frame, limits: DecodeLimits
) -> None:
    """Walk the scans from the first one on, whose length stands at ``position``."""
    scans, samples, marker = 0, 0, _SOS
    max_samples = MAX_PASSES * limits.max_decoded_bytes
    while True:
        if marker == _SOS:
            scans = count(scans, limits.max_scans, "scans")
            samples += frame.of_scan(data, position)
            if scans > 1 and samples > max_samples:
                raise ImageTooLarge(
                    f"the JPEG's first {scans} scans go over {samples:,} samples; "
                    f"at most {max_samples:,} are accepted"
                )
        if marker not in _ALONE:
            position += struct.unpack_from(">H", data, position)[0]
        end = _end_of_scan(data, position)
        if end is None or data[end - 1] == _EOI:
            return
        marker, position = data[end - 1], end
        parts = count(parts, limits.max_parts, "markers")


def _end_of_scan(data: bytes, position: int) -> int | None:
    """Where the next marker that is not of a scan ends."""
    for start in range(position, len(data), WINDOW_BYTES):
        if found := _SCAN_ENDS.search(data, start, start + WINDOW_BYTES + 1):
            return found.end()
    return None


def _check_png(data: bytes, limits: DecodeLimits) -> bytes:
    """Walk the chunks, and keep those that decide over pixels."""
    if data[12:16] != b"IHDR":
        raise InvalidImage("the image cannot be decoded: the PNG does not begin with its header")
    width_px, height_px, bits, kind = struct.unpack_from(">IIBB", data, 16)
    if kind not in PNG_CHANNELS:
        raise InvalidImage(f"the image cannot be decoded: a PNG has no colour type {kind}")
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
