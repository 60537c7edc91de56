"""Measures how much time it saves to shrink JPEGs while decoding, and how it changes the pixels.

    python -m benchmarks.decode [--json FILE]

Photographs are enlarged to 1, 3 and 12 megapixels and decoded to 224×224: once in full size, and
with at least 1, 2 and 3 times the needed size kept.
"""

import io
import sys
import time
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import parser, report
from registry.model.image import decode
from registry.model.image.limits import TRUSTED_LIMITS
from registry.model.manifest import PreprocessSpec

SPEC = PreprocessSpec(
    mode="RGB",
    width_px=224,
    height_px=224,
    resize_shorter_px=256,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
PHOTOGRAPHS = {
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "astronaut": ("skimage", "data/astronaut.png"),
}
MEGAPIXELS = (1, 3, 12)
GAPS = (1, 2, 3)
NEVER = 1_000_000
REPETITIONS = 5


def main() -> int:
    arguments = parser("Time saved by shrinking JPEGs while decoding.").parse_args()
    figures: dict[str, Any] = {}
    for name, (package, path) in PHOTOGRAPHS.items():
        with Image.open(files(package).joinpath(path).open("rb")) as opened:
            photograph = opened.convert("RGB")
        for megapixels in MEGAPIXELS:
            data = enlarged(photograph, megapixels)
            full_ms, full = timed_decode(data, NEVER)
            figures[f"{name}, {megapixels} Mpx, full, ms"] = full_ms
            for gap in GAPS:
                took_ms, pixels = timed_decode(data, gap)
                off = np.abs(pixels.astype(int) - full)
                figures[f"{name}, {megapixels} Mpx, {gap}×, ms"] = took_ms
                figures[f"{name}, {megapixels} Mpx, {gap}×, levels off"] = (
                    f"{off.mean():.2f} mean, {off.max()} at most"
                )
    report(figures, arguments.json)
    return 0


def enlarged(photograph: Image.Image, megapixels: float) -> bytes:
    """A JPEG of about ``megapixels``, with sides that are multiples of eight."""
    scale = (megapixels * 1e6 / (photograph.width * photograph.height)) ** 0.5
    size = (int(photograph.width * scale) // 8 * 8, int(photograph.height * scale) // 8 * 8)
    buffer = io.BytesIO()
    photograph.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def timed_decode(data: bytes, gap: int) -> tuple[float, decode.Pixels]:
    """The fastest repetition in ms, and the pixels, if ``gap`` times the needed size is kept."""
    decode.REDUCING_GAP = gap
    took_ms = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        pixels = decode.decode_image(data, SPEC, TRUSTED_LIMITS)
        took_ms.append((time.perf_counter() - started) * 1000)
    return min(took_ms), pixels


if __name__ == "__main__":
    sys.exit(main())
