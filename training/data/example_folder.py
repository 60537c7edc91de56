"""Reads the pictures that an import gets: with labels, if they lie in folders named after them."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from registry.core.errors import ConvoyError, UsageError
from registry.model.image.decode import decode_training_image
from registry.model.image.limits import TRUSTED_LIMITS
from registry.model.manifest import PreprocessSpec
from training.data.memory import check_memory
from training.data.sources import Examples

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_EXAMPLES = 50_000


def read_examples(
    folder: Path, labels: tuple[str, ...], spec: PreprocessSpec
) -> tuple[Examples, bool]:
    """The pictures below ``folder``, each once, and whether their labels are known.

    Without known labels, all labels are 0.

    Raises:
        UsageError: there is no picture, one cannot be decoded, or only some have labels.
    """
    if not folder.is_dir():
        raise UsageError(f"the folder {folder} does not exist")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise UsageError(f"the folder {folder} has no picture")
    if len(files) > MAX_EXAMPLES:
        raise UsageError(
            f"the folder {folder} has {len(files):,} pictures; at most {MAX_EXAMPLES:,}"
        )
    classes = [_class_of(path, folder, labels) for path in files]
    known = Counter(each is not None for each in classes)
    if known[True] and known[False]:
        path = files[classes.index(None)]
        raise UsageError(
            f"{path} is in no folder that is named after a label, but {known[True]:,} others are"
        )
    return decode_examples(files, [each or 0 for each in classes], spec), known[True] > 0


def decode_examples(files: list[Path], classes: list[int], spec: PreprocessSpec) -> Examples:
    """The pictures of ``files`` with their classes; of equal pictures, the first.

    Raises:
        UsageError: a picture cannot be decoded, or there are too many for the memory.
    """
    check_memory(
        f"{len(files):,} pictures", len(files) * math.prod(spec.shape), "use fewer pictures"
    )
    found: dict[str, int] = {}
    pixels = []
    for position, path in enumerate(tqdm(files, unit="img", desc="reading pictures", disable=None)):
        try:
            decoded, digest = decode_training_image(path.read_bytes(), spec, TRUSTED_LIMITS)
        except (ConvoyError, OSError) as error:
            raise UsageError(f"{path}: {error}") from error
        if digest not in found:
            found[digest] = position
            pixels.append(decoded)
    positions = list(found.values())
    return Examples(
        np.stack(pixels),
        np.array([classes[each] for each in positions], np.int64),
        tuple(found),
        lambda index: files[positions[index]].read_bytes(),
    )


def _class_of(path: Path, folder: Path, labels: tuple[str, ...]) -> int | None:
    """The class that the nearest folder below ``folder`` names; None if none does."""
    for parent in path.relative_to(folder).parts[-2::-1]:
        if parent in labels:
            return labels.index(parent)
    return None
