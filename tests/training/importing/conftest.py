"""Pictures, and the answers that a model's owner had for them."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from registry.model.image.decode import decode_image
from tests.training.importing.graphs import spatial
from training.importing.graph import describe, read_graph
from training.importing.owner import OwnerGraph
from training.importing.preprocess_file import make_spec

LABELS = ("cat", "dog", "fish")
# How the owner's script prepared pictures.
HOME: dict[str, Any] = {
    "mode": "BGR", "size": 16, "mean": [0.4, 0.45, 0.5], "std": [0.2, 0.25, 0.3],
    "resize_shorter_px": 20, "interpolation": "bicubic",
}  # fmt: skip
WriteReference = Callable[..., Path]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """24 pictures of random, smooth colours, 60×44 and 44×60."""
    random = np.random.default_rng(2)
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = []
    for number in range(24):
        rough = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8))
        size = (60, 44) if number % 2 else (44, 60)
        paths.append(folder / f"{number:02}.png")
        rough.resize(size, Image.Resampling.BICUBIC).save(paths[-1])
    return paths


@pytest.fixture
def graph() -> bytes:
    return spatial()


@pytest.fixture
def write_reference(tmp_path: Path, pictures: list[Path], graph: bytes) -> WriteReference:
    """Writes the owner's answers: a column for each label, or only the best one."""

    def write(only_labels: bool = False, labels: tuple[str, ...] = LABELS) -> Path:
        facts = describe(read_graph(graph))
        owner = OwnerGraph(graph, facts, facts.scores)
        spec = make_spec(HOME, 16, 16, 3)
        decoded = [decode_image(path.read_bytes(), spec) for path in pictures]
        answers = owner.probabilities(decoded, spec)
        file = tmp_path / "reference.csv"
        with file.open("w", newline="") as opened:
            rows = csv.writer(opened)
            rows.writerow(["file", "label"] if only_labels else ["file", *labels])
            for path, row in zip(pictures, answers, strict=True):
                values = [labels[int(row.argmax())]] if only_labels else row.tolist()
                rows.writerow([path.relative_to(tmp_path), *values])
        return file

    return write
