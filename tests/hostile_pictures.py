"""Pictures made to hurt whoever decodes them, by name. Each is a few lines, so that one sees how.

What is expected of every one of them: a refusal, or an answer, within a second and little memory.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from random import Random

from PIL import Image

from registry.contract import PreprocessSpec

# As a network for photographs has it.
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
    """A PNG of that header; ``more`` are chunks before the pixels, which are compressed here."""
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
    """A progressive JPEG whose last scan stands there again and again."""
    data = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def webp_claiming(width: int, height: int) -> bytes:
    bits = (width - 1) | (height - 1) << 14
    body = b"WEBPVP8L" + struct.pack("<IBI", 5, 0x2F, bits) + b"\0"
    return b"RIFF" + struct.pack("<I", len(body)) + body


def exif_of(entries: int) -> bytes:
    """A JPEG whose EXIF has ever so many entries, over as many segments as that takes."""
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
    """Valid, and slow to unpack: random bytes under random filters."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    row = side * channels * bits // 8
    random = Random(side)
    rows = (
        bytes([random.randrange(5)]) + bytes(row - 64) + random.randbytes(64) for _ in range(side)
    )
    return png(side, side, b"".join(rows), bits=bits, kind=kind)


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
    "png of 12 megapixels, grey, 16 bits": lambda: noisy_png(3400, 0, 16),
    "png of 12 megapixels, grey and alpha": lambda: noisy_png(3400, 4, 8),
    "jpeg claiming 9400×9400 in 689 bytes": lambda: jpeg_claiming(9400, 9400),
    "jpeg claiming 3400×3400 in 689 bytes": lambda: jpeg_claiming(3400, 3400),
    "jpeg of 5,000 scans": lambda: jpeg_of_scans(5000, 2000),
    "jpeg of 60 scans, 12 megapixels": lambda: jpeg_of_scans(50, 3400),
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
    "a gif": lambda: encoded(Image.new("P", (8, 8)), "GIF"),
    "a bmp": lambda: encoded(Image.new("RGB", (8, 8)), "BMP"),
    "a script": lambda: b"#!/bin/sh\ntouch /tmp/marker\n",
    "an svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
}


def mutants(seeds: list[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """``seeds`` with bytes changed, cut, doubled or swapped between them."""
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
    """A PNG whose checksums are right again, so that what was changed is looked at."""
    if not data.startswith(PNG):
        return data
    pieces, position = [PNG], len(PNG)
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        pieces.append(chunk(data[position + 4 : position + 8], data[position + 8 :][:length]))
        position += length + 12
    return b"".join(pieces)
