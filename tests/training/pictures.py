"""Real encoded pictures for the tests of training."""

from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    """Write a picture of noise, seeded by ``seed``, in the format of the suffix of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


def pictures(folder: Path, count: int, seed: int = 0) -> None:
    """Write ``count`` different pictures into ``folder``."""
    for number in range(count):
        picture(folder / f"{number}.png", 1000 * seed + number, (16, 16))
