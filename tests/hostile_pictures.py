"""Pictures that attack a decoder, by name. Each is a few lines, so that a reader sees the attack.

The decoder must refuse each picture, or answer it, within a second and with little memory.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from random import Random

from PIL import Image

from registry.model.manifest import PreprocessSpec

# The usual preprocessing of photographs.
SPEC = PreprocessSpec(
    mode="RGB", width_px=224, height_px=224, resize_shorter_px=256, mean=(0.5,) * 3, std=(0.5,) * 3
)
PNG = b"\x89PNG\r\n\x1a\n"
MEGAPIXEL = 1_000_000


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(
    width: int, height: int, pixels: bytes = b"", *more: bytes, bits: int = 8, kind: int = 2
) -> bytes:
    """A PNG with that header. ``pixels`` are compressed here; the chunks ``more`` precede them."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(pixels, 1))
    return PNG + chunk(b"IHDR", header) + b"".join(more) + data + chunk(b"IEND", b"")


def small_jpeg(**options: object) -> bytes:
    return encoded(Image.new("RGB", (64, 48), "teal"), "JPEG", **options)


def after_start(jpeg: bytes, inserted: bytes) -> bytes:
    return jpeg[:2] + inserted + jpeg[2:]


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(small_jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_of_scans(scans: int, side: int) -> bytes:
    """A progressive JPEG whose last scan is repeated ``scans`` times."""
    data = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def webp_claiming(width: int, height: int) -> bytes:
    bits = (width - 1) | (height - 1) << 14
    body = b"WEBPVP8L" + struct.pack("<IBI", 5, 0x2F, bits) + b"\0"
    return b"RIFF" + struct.pack("<I", len(body)) + body


def exif_of(entries: int) -> bytes:
    """A JPEG with so many EXIF entries, over as many segments as they need."""
    rows = b"".join(struct.pack("<HHII", 0x9000 + n % 999, 3, 0xFFFF, 8) for n in range(entries))
    tiff = b"II*\0" + struct.pack("<IH", 8, entries) + rows + bytes(4)
    pieces = [tiff[at : at + 65_000] for at in range(0, len(tiff), 65_000)]
    return after_start(small_jpeg(), b"".join(segment(0xE1, b"Exif\0\0" + p) for p in pieces))


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def animation(frames: int, kind: str) -> bytes:
    first, *rest = (Image.new("RGB", (16, 16), (n % 256, n // 256, 9)) for n in range(frames))
    return encoded(first, kind, save_all=True, append_images=rest)


def packed_text(number: int) -> list[bytes]:
    bomb = zlib.compress(bytes(MEGAPIXEL), 9)
    return [chunk(b"zTXt", b"%d\0\0" % n + bomb) for n in range(number)]


def noisy_png(side: int, kind: int, bits: int) -> bytes:
    """A valid PNG that is slow to unpack: random bytes with random filters."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    row = side * channels * bits // 8
    random = Random(side)
    rows = (
        bytes([random.randrange(5)]) + bytes(row - 64) + random.randbytes(64) for _ in range(side)
    )
    return png(side, side, b"".join(rows), bits=bits, kind=kind)


def gif(*blocks: bytes, screen: int = 16, side: int = 16) -> bytes:
    """A GIF of one frame, with ``blocks`` before it."""
    picture = encoded(Image.new("P", (16, 16)), "GIF")
    flags = picture[10]
    end = 13 + (3 << (flags & 7) + 1)
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, flags, 0, 0) + picture[13:end]
    frame = struct.pack("<HHHH", 0, 0, side, side)
    return head + b"".join(blocks) + b"," + frame + picture[picture.index(b",", end) + 9 :]


def comment(size: int) -> bytes:
    """A GIF comment in ``size`` blocks of one byte."""
    return b"!\xfe" + b"\x01x" * size + b"\0"


def bmp(
    width: int, height: int, pixels: bytes, *, bits: int = 8, compression: int = 0, colours: int = 0
) -> bytes:
    header = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, colours, 0
    )
    palette = bytes(4 * (colours or 1 << bits)) if bits <= 8 else b""
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, start) + header + palette + pixels


def tiff(
    *more: tuple[int, int, int, int],
    width: int = 16,
    height: int = 16,
    compression: int = 1,
    pixels: bytes = bytes(256),
    next_directory: int = 0,
) -> bytes:
    """A grey TIFF of one strip; ``more`` are entries of its directory: tag, type, count, value."""
    entries = {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, 1, 8),
        259: (3, 1, compression),
        262: (3, 1, 1),
        273: (4, 1, 8),
        277: (3, 1, 1),
        278: (4, 1, height),
        279: (4, 1, len(pixels)),
    }
    entries |= {tag: rest for tag, *rest in more}  # type: ignore[misc]
    rows = b"".join(struct.pack("<HHII", tag, *entries[tag]) for tag in sorted(entries))
    start = 8 + len(pixels)
    directory = struct.pack("<H", len(entries)) + rows + struct.pack("<I", next_directory)
    return b"II*\0" + struct.pack("<I", start) + pixels + directory


def tiff_of_entries(number: int) -> bytes:
    """A TIFF with so many entries of 1 MB, which all point to the same bytes."""
    return tiff(
        *[(tag, 1, 1_000_000, 0) for tag in range(1000, 1000 + number)], pixels=bytes(1_000_000)
    )


HOSTILE: dict[str, Callable[[], bytes]] = {
    "webp claiming 9000×9000 in 34 bytes": lambda: webp_claiming(9000, 9000),
    "webp claiming 3400×3400 in 34 bytes": lambda: webp_claiming(3400, 3400),
    "webp of 4,000 frames": lambda: animation(4000, "WEBP"),
    "png of 177 megapixels": lambda: png(13_310, 13_310, bytes(13_311 * 13_310), kind=0),
    "png claiming 2³¹ × 2³¹": lambda: png(2**31 - 1, 2**31 - 1),
    "png of no pixels": lambda: png(0, 0),
    "png 60000×1": lambda: png(60_000, 1, bytes(60_001), kind=0),
    "png of 200,000 texts": lambda: png(
        8, 8, bytes(200), *[chunk(b"tEXt", b"k%d\0v" % n) for n in range(200_000)]
    ),
    "png of 900 packed texts": lambda: png(8, 8, bytes(200), *packed_text(900)),
    "png of 30 packed texts": lambda: png(8, 8, bytes(200), *packed_text(30)),
    "png of a packed profile": lambda: png(
        8, 8, bytes(200), chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(8 * MEGAPIXEL), 9))
    ),
    "png of 300,000 chunks of pixels": lambda: (
        png(8, 8)[:33] + chunk(b"IDAT", b"") * 300_000 + png(8, 8, bytes(200))[33:]
    ),
    "png of 9,900 chunks of pixels": lambda: (
        png(8, 8)[:33] + chunk(b"IDAT", b"") * 9_900 + png(8, 8, bytes(200))[33:]
    ),
    "png with 200 MB of pixels too many": lambda: png(8, 8, bytes(200 * MEGAPIXEL)),
    "png of 12 megapixels, RGBA, 16 bits": lambda: noisy_png(3400, 6, 16),
    "png of 9 megapixels, RGBA, 16 bits": lambda: noisy_png(3000, 6, 16),
    "png of 12 megapixels, grey, 16 bits": lambda: noisy_png(3400, 0, 16),
    "png of 12 megapixels, grey and alpha": lambda: noisy_png(3400, 4, 8),
    "jpeg claiming 9400×9400 in 689 bytes": lambda: jpeg_claiming(9400, 9400),
    "jpeg claiming 3400×3400 in 689 bytes": lambda: jpeg_claiming(3400, 3400),
    "jpeg of 5,000 scans": lambda: jpeg_of_scans(5000, 2000),
    "jpeg of 60 scans, 12 megapixels": lambda: jpeg_of_scans(50, 3400),
    "jpeg of 12 scans, 50 megapixels": lambda: jpeg_of_scans(2, 7000),
    "jpeg of 60 scans, 50 megapixels": lambda: jpeg_of_scans(50, 7000),
    "jpeg of 25 MB of false scans": lambda: (
        small_jpeg()[:-2] + b"\xff\0" * 12_500_000 + b"\xff\xda" * 100
    ),
    "jpeg of arithmetic codes": lambda: small_jpeg().replace(b"\xff\xc0", b"\xff\xc9"),
    "jpeg without losses": lambda: small_jpeg().replace(b"\xff\xc0", b"\xff\xc3"),
    "jpeg of 4 MB of padding": lambda: after_start(small_jpeg(), b"\xff" * 4_000_000),
    "jpeg of 4 MB of junk": lambda: after_start(small_jpeg(), b"\0" * 4_000_000),
    "jpeg of 200,000 markers": lambda: after_start(small_jpeg(), segment(0xE5, b"x") * 200_000),
    "jpeg of 900 markers of 8 KB": lambda: after_start(
        small_jpeg(), segment(0xE5, bytes(8192)) * 900
    ),
    "jpeg of 65,000 EXIF entries": lambda: exif_of(65_000),
    "jpeg without a scan": lambda: small_jpeg().replace(b"\xff\xda", b"\xff\xfe"),
    "jpeg without a size": lambda: small_jpeg().replace(b"\xff\xc0", b"\xff\xfe"),
    "jpeg of one byte": lambda: b"\xff\xd8\xff",
    "jpeg whose lengths are zero": lambda: b"\xff\xd8" + b"\xff\xe0\0\0" * 500_000,
    "nothing": lambda: b"",
    "gif of 400,000 blocks of comment": lambda: gif(comment(400_000)),
    "gif of 900 blocks of comment": lambda: gif(comment(900)),
    "gif whose frame is larger than its screen": lambda: gif(side=60_000),
    "gif claiming 5000×5000 in 800 bytes": lambda: gif(side=5_000),
    "gif of junk": lambda: gif(b"\x77" * 1_000_000),
    "gif of 4,000 frames": lambda: animation(4000, "GIF"),
    "bmp of runs": lambda: bmp(5000, 5000, b"\x01\x00" * 5_000_000, compression=1),
    "bmp of 60,000 colours": lambda: bmp(8, 8, bytes(64), colours=60_000),
    "bmp claiming 2³¹": lambda: bmp(2**31 - 1, -(2**31), b""),
    "bmp claiming 5000×5000": lambda: bmp(5000, 5000, b""),
    "bmp with a png in it": lambda: bmp(8, 8, png(8, 8), bits=24, compression=5),
    "ppm of an endless comment": lambda: b"P6\n#" + b"x" * 5_000_000,
    "ppm of plain numbers": lambda: b"P2\n5000 5000\n255\n" + b"1 " * 5_000_000,
    "ppm of an odd depth": lambda: b"P6\n2000 2000\n254\n" + bytes(12_000_000),
    "ppm claiming 5000×5000": lambda: b"P6\n5000 5000\n255\n",
    "ppm of floats": lambda: b"Pf\n5000 5000\n1.0\n" + bytes(100),
    "tiff of 900 entries of 1 MB": lambda: tiff_of_entries(900),
    "tiff of 60,000 entries of 1 MB": lambda: tiff_of_entries(60_000),
    "tiff whose directories form a ring": lambda: tiff(next_directory=264),
    "tiff whose EXIF is its own directory": lambda: tiff((0x8769, 4, 1, 264)),
    "tiff of a million strips": lambda: tiff(
        (273, 4, 1_000_000, 8), (278, 4, 1, 1), pixels=bytes(4_000_000)
    ),
    "tiff of 60,000 × 60,000 a tile": lambda: tiff(
        (322, 4, 1, 60_000), (323, 4, 1, 60_000), (324, 4, 1, 8), (325, 4, 1, 256)
    ),
    "tiff of 2³² rows a strip": lambda: tiff(
        (278, 4, 1, 2**32 - 1), compression=8, pixels=zlib.compress(bytes(256))
    ),
    "tiff of 4 GB of deflate": lambda: tiff(
        compression=8, pixels=zlib.compress(bytes(200 * MEGAPIXEL), 1)
    ),
    "tiff claiming 5000×5000": lambda: tiff(width=5000, height=5000, compression=8),
    "tiff claiming 2³² × 2³²": lambda: tiff(width=2**32 - 1, height=2**32 - 1),
    "tiff of jpeg": lambda: tiff(compression=7, pixels=small_jpeg()),
    "tiff of fax": lambda: tiff(compression=4),
    "tiff of 64 bits": lambda: b"II+\0\x08\0\0\0" + bytes(100),
    "tiff of nothing": lambda: b"II*\0",
    "tiff of 65,535 samples": lambda: tiff((277, 3, 1, 65_535)),
    "a heic": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(1000),
    "an avif of 8000×6000 in 1.2 KB": lambda: encoded(
        Image.new("RGB", (8000, 6000), "teal"), "AVIF", speed=10
    ),
    "a script": lambda: b"#!/bin/sh\ntouch /tmp/marker\n",
    "an svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
}


def mutants(seeds: list[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """``count`` random variants of ``seeds``, with bytes changed, inserted, cut or doubled."""
    random = Random(seed)
    for _ in range(count):
        data = bytearray(random.choice(seeds))
        for _ in range(random.randint(1, 8)):
            at, kind = random.randrange(len(data) + 1), random.randrange(5)
            if kind == 0 and at < len(data):
                data[at] = random.randrange(256)
            elif kind == 1:
                data[at : at + random.randrange(64)] = random.randbytes(random.randrange(64))
            elif kind == 2:
                del data[at : at + random.randrange(1 + len(data) // 4)]
            elif kind == 3:
                data[at:at] = data[at : at + random.randrange(256)]
            elif at + 4 <= len(data):
                data[at : at + 4] = random.choice(
                    (b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff")
                )
        yield with_checksums(bytes(data)) if random.random() < 0.5 else bytes(data)


def with_checksums(data: bytes) -> bytes:
    """``data``, if a PNG with correct checksums, so that a decoder reads the changed chunks."""
    if not data.startswith(PNG):
        return data
    pieces, position = [PNG], len(PNG)
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        pieces.append(chunk(data[position + 4 : position + 8], data[position + 8 :][:length]))
        position += length + 12
    return b"".join(pieces)
