"""Makes a data set of photographs for the second workload: 500×375 JPEGs of ten subjects.

    python -m benchmarks.photographs FOLDER [--each 60] [--seed 0]

The pictures are crops of the photographs in scikit-learn and scikit-image, at random places and
sizes, half of them mirrored, some lighter and some darker. Each photograph has a folder, for
``convoy train --data folder:FOLDER --image-size 224 --recipe resnet18``.
"""

import argparse
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

SIZE_PX = (500, 375)
QUALITY = 88
SUBJECTS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
}


def crop(photograph: Image.Image, random: np.random.Generator) -> Image.Image:
    """A random part of ``photograph``, resized to 500×375."""
    largest = min(photograph.width / SIZE_PX[0], photograph.height / SIZE_PX[1])
    scale = largest * random.uniform(0.45, 1.0)
    width, height = SIZE_PX[0] * scale, SIZE_PX[1] * scale
    left = random.uniform(0, photograph.width - width)
    top = random.uniform(0, photograph.height - height)
    part = photograph.resize(
        SIZE_PX, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
    )
    if random.random() < 0.5:
        part = ImageOps.mirror(part)
    return ImageEnhance.Brightness(part).enhance(random.uniform(0.7, 1.3))


def write_photographs(folder: Path, each: int, seed: int) -> None:
    """Write ``each`` pictures of every subject to ``folder``; the same ones for the same seed."""
    random = np.random.default_rng(seed)
    for subject, (package, name) in SUBJECTS.items():
        with Image.open(files(package).joinpath(name).open("rb")) as opened:
            photograph = opened.convert("RGB")
        target = folder / subject
        target.mkdir(parents=True, exist_ok=True)
        for number in range(each):
            crop(photograph, random).save(target / f"{number:03}.jpg", quality=QUALITY)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Pictures of ten subjects for the benchmarks.")
    options.add_argument("folder", type=Path)
    options.add_argument("--each", type=int, default=60, help="pictures of each subject")
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    write_photographs(arguments.folder, arguments.each, arguments.seed)
