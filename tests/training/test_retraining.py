"""What every user does again and again: add pictures, train, and promote if the gate accepts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from registry.cli.main import main as registry
from registry.core.paths import Paths
from registry.store.mlflow_store import ModelStore
from training.__main__ import main as training
from training.data.sources import load_dataset

pytestmark = pytest.mark.slow

COLOURS = {"cat": 0, "dog": 1, "bird": 2}


def add_pictures(root: Path, label: str, numbers: range) -> None:
    """Write pictures of noise in which the colour of the class dominates."""
    (root / label).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        random = np.random.default_rng([number, COLOURS[label]])
        pixels = random.integers(0, 60, (24, 24, 3), dtype=np.uint8)
        pixels[..., COLOURS[label]] += 120
        Image.fromarray(pixels).save(root / label / f"{number}.png")


def train(folder: Path, *changes: str) -> None:
    settings = [word for change in changes for word in ("--set", change)]
    data = ("--data", f"folder:{folder}", "--image-size", "16", "--device", "cpu")
    network = ("--recipe", "dense", "--set", "hidden=8", "--set", "batch_size=16")
    assert training([*data, *network, "--model", "pets", *settings]) == 0


def promote(version: int, *arguments: str) -> int:
    return registry(["promote", "pets", str(version), "--skip-latency", *arguments])


def test_the_gate_accepts_a_version_with_a_new_class_and_refuses_one_that_is_less_accurate(
    registry_paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pets"
    for label in ("cat", "dog"):
        add_pictures(folder, label, range(60))
    train(folder, "epochs=15", "learning_rate=0.01")
    assert promote(1) == 0

    for label in ("cat", "dog"):
        add_pictures(folder, label, range(60, 70))
    add_pictures(folder, "bird", range(20))
    train(folder, "epochs=15", "learning_rate=0.01")
    capsys.readouterr()
    assert promote(2) == 2
    printed = capsys.readouterr()
    assert "labels that appear: 'bird'" in printed.out
    assert "indices that change: 'cat' 0 → 1, 'dog' 1 → 2" in printed.out
    assert "--allow-new-classes accepts that" in printed.err
    assert promote(2, "--allow-new-classes") == 0
    assert "accepted" in capsys.readouterr().out

    add_pictures(folder, "dog", range(70, 90))
    train(folder, "epochs=1", "learning_rate=1e-9")
    capsys.readouterr()
    assert promote(3) == 2
    printed = capsys.readouterr()
    assert "REFUSED" in printed.out
    assert " in common, " in printed.out
    assert "NOT passed: accuracy" in printed.err

    assert promote(3, "--force", "--reason", "a drill") == 0
    assert "accuracy" in capsys.readouterr().out
    entries = [line.entry for line in ModelStore(registry_paths).audit_logs.read("pets").lines]
    actions = [(entry.action, entry.to_version) for entry in entries]
    assert actions == [
        ("promoted", 1),
        ("refused", 2),
        ("promoted", 2),
        ("refused", 3),
        ("forced", 3),
    ]
    forced = str(entries[-1].details)
    for kept in ("on the same", "NOT passed: accuracy", "calibration error", "log loss", "recall"):
        assert kept in forced


def test_a_picture_keeps_its_digest_and_split_at_another_size_and_after_others_are_added(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "pets"
    for label in ("cat", "dog"):
        add_pictures(folder, label, range(60))
    first = load_dataset(f"folder:{folder}", tmp_path, 16)
    add_pictures(folder, "bird", range(20))
    again = load_dataset(f"folder:{folder}", tmp_path, 32)
    for name in ("train", "validation", "test"):
        before, after = getattr(first, name).digests, getattr(again, name).digests
        assert set(before) < set(after)
