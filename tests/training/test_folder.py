"""Folders as users have them: layouts, links, odd names, and files that are not pictures."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from registry.core.errors import UsageError
from registry.model.image.decode import decode_image
from tests.training.pictures import picture, pictures
from training.data import memory
from training.data.pictures import put_in_order
from training.data.sources import Dataset, load_dataset
from training.data.split import complete_split


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Path], Dataset]:
    return lambda folder: load_dataset(f"folder:{folder}", tmp_path / "cache", size_px=16)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Two classes of 30 pictures."""
    root = tmp_path / "plain"
    pictures(root / "cat", 30, seed=1)
    pictures(root / "dog", 30, seed=2)
    return root


@pytest.fixture
def in_splits(tmp_path: Path) -> Path:
    """train, val and test, each with two classes."""
    root = tmp_path / "in splits"
    for number, split in enumerate(("train", "val", "test")):
        pictures(root / split / "cat", 5 - number, seed=10 + number)
        pictures(root / split / "dog", 5 - number, seed=20 + number)
    return root


@pytest.mark.parametrize(
    "names",
    [("train", "val", "test"), ("training", "validation", "testing"), ("Train", "VALID", "Test")],
)
def test_a_folder_with_splits_keeps_its_splits(
    in_splits: Path, load: Callable[[Path], Dataset], names: Any
) -> None:
    for before, after in zip(("train", "val", "test"), names, strict=True):
        (in_splits / before).rename(in_splits / after)
    data = load(in_splits)
    assert data.labels == ("cat", "dog")
    assert data.counts == {"train": 10, "validation": 8, "test": 6}
    assert data.notes == ()


def test_a_split_that_the_folder_lacks_is_taken_from_its_training_pictures(
    in_splits: Path, load: Callable[[Path], Dataset]
) -> None:
    shutil.rmtree(in_splits / "val")
    shutil.rmtree(in_splits / "test")
    pictures(in_splits / "train" / "cat", 40, seed=30)
    data = load(in_splits)
    assert sum(data.counts.values()) == 45
    for split in ("validation", "test"):
        assert data.counts[split] > 0
        assert f"no {split} split: {data.counts[split]} of its training" in "\n".join(data.notes)


def test_a_picture_that_another_split_holds_out_is_removed_from_training(
    in_splits: Path, load: Callable[[Path], Dataset]
) -> None:
    shutil.copy(in_splits / "val" / "cat" / "0.png", in_splits / "train" / "cat" / "copy.png")
    shutil.copy(in_splits / "test" / "dog" / "0.png", in_splits / "val" / "dog" / "copy.png")
    data = load(in_splits)
    assert data.counts == {"train": 10, "validation": 8, "test": 6}
    assert "1 pictures were removed from training, and 1 from validation" in data.notes[0]
    reason = "the same picture is held out in another split"
    assert set(data.problems) == {f"train/cat/copy.png: {reason}", f"val/dog/copy.png: {reason}"}


def test_a_held_out_class_without_training_pictures_is_refused(
    in_splits: Path, load: Callable[[Path], Dataset]
) -> None:
    (in_splits / "train" / "cat").rename(in_splits / "train" / "kitten")
    with pytest.raises(UsageError, match="no training picture of class cat, which has held-out"):
        load(in_splits)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (("train/cat", "train/dog", "val/cat", "extra"), "the folder also has extra/"),
        (("train/cat", "train/dog", "training/cat", "training/dog"), "two of them mean the same"),
        (("val/cat", "val/dog", "test/cat", "test/dog"), "there is no folder train"),
        (("train", "val"), "train/, val/ could be splits or classes"),
        (("cat", "dog", "test"), "the folder also has cat/, dog/"),
        (("cat/train", "cat/val", "dog/train", "dog/val"), "cat contains folders named after"),
    ],
)
def test_a_layout_that_could_be_splits_or_classes_is_refused_with_the_folders_names(
    tmp_path: Path, load: Callable[[Path], Dataset], layout: tuple[str, ...], reason: str
) -> None:
    for number, folder in enumerate(layout):
        pictures(tmp_path / "odd" / folder, 3, seed=number)
    with pytest.raises(UsageError, match=reason):
        load(tmp_path / "odd")


def test_one_class_may_be_named_like_a_split(
    tmp_path: Path, load: Callable[[Path], Dataset]
) -> None:
    for number, vehicle in enumerate(("train", "bus", "car")):
        pictures(tmp_path / "vehicles" / vehicle, 20, seed=number)
    assert load(tmp_path / "vehicles").labels == ("bus", "car", "train")


def test_a_split_folder_without_class_folders_is_left_out_by_name(
    in_splits: Path, load: Callable[[Path], Dataset]
) -> None:
    shutil.rmtree(in_splits / "test")
    pictures(in_splits / "test", 4, seed=40)
    pictures(in_splits / "train" / "cat", 30, seed=41)
    data = load(in_splits)
    assert "test: has no class folders in it" in data.problems
    assert data.counts["test"] > 0


def test_every_entry_that_is_neither_used_nor_hidden_is_named(
    plain: Path, tmp_path: Path, load: Callable[[Path], Dataset]
) -> None:
    picture(plain / "loose.png", 1)
    picture(tmp_path / "elsewhere" / "linked.png", 2)
    picture(tmp_path / "elsewhere" / "deep" / "too.png", 3)
    (plain / "cat" / "elsewhere").symlink_to(tmp_path / "elsewhere")
    (plain / "cat" / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    (plain / "cat" / "dangling.png").symlink_to(plain / "nowhere.png")
    (plain / "cat" / "loop").symlink_to(plain)
    (plain / "cat" / "self").symlink_to(plain / "cat" / "self")
    (plain / "cat" / "dogs").symlink_to(plain / "dog")
    (plain / "dog" / "file.png").symlink_to(tmp_path / "elsewhere" / "linked.png")
    (plain / "dog" / "file.png").unlink()
    (plain / "empty").mkdir()
    (plain / "dog" / "notes.txt").write_text("not a picture")
    (plain / "dog" / ".hidden").write_text("hidden")
    os.mkfifo(plain / "dog" / "pipe.png")
    data = load(plain)
    assert sum(data.counts.values()) == 62  # 60, and two that a link points to
    reasons = dict(problem.split(": ", 1) for problem in data.problems)
    assert set(reasons) == {
        *("loose.png", "empty", "dog/notes.txt", "dog/pipe.png"),
        *("cat/dangling.png", "cat/loop", "cat/self", "cat/dogs"),
        # One of the two names of the same folder; their order decides which one is read.
        *({"cat/elsewhere/deep", "cat/again"} & set(reasons)),
    }
    assert len({"cat/elsewhere/deep", "cat/again"} & set(reasons)) == 1
    assert "is a broken link" in reasons["cat/dangling.png"]
    assert "is already part of the data set" in reasons["cat/dogs"]
    assert "neither a file nor a folder" in reasons["dog/pipe.png"]
    assert data.labels == ("cat", "dog")


def test_a_folder_that_cannot_be_read_is_named(
    plain: Path, load: Callable[[Path], Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(plain / "cat" / "private", 3, seed=9)
    original = Path.iterdir

    def refuse(self: Path) -> Any:
        if self.name == "private":
            raise PermissionError(13, "Permission denied")
        return original(self)

    monkeypatch.setattr(Path, "iterdir", refuse)  # file modes would not stop root
    data = load(plain)
    assert data.problems == ("cat/private: cannot be read: Permission denied",)


def test_file_names_need_not_be_utf8(plain: Path, load: Callable[[Path], Dataset]) -> None:
    (plain / "cat" / os.fsdecode(b"caf\xe9.txt")).write_text("not a picture")
    picture(plain / "cat" / "tea.png", 77)
    (plain / "cat" / "tea.png").rename(plain / "cat" / os.fsdecode(b"th\xe9.png"))
    data = load(plain)
    assert sum(data.counts.values()) == 61
    (problem,) = data.problems
    assert problem.startswith(r"cat/caf\xe9.txt: ")


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines"])
def test_a_class_name_that_cannot_be_a_label_is_refused_before_reading(
    plain: Path, load: Callable[[Path], Dataset], name: bytes
) -> None:
    (plain / "cat").rename(plain / os.fsdecode(name))
    with pytest.raises(UsageError, match="rename the folder") as caught:
        load(plain)
    str(caught.value).encode()


def test_a_hundred_classes_of_five_pictures_can_all_be_learnt(
    tmp_path: Path, load: Callable[[Path], Dataset]
) -> None:
    for number in range(100):
        pictures(tmp_path / "many" / f"c{number:03}", 5, seed=number)
    data = load(tmp_path / "many")
    assert len(data.labels) == len(set(data.train.labels.tolist())) == 100
    assert sum(data.counts.values()) == 500


def test_classes_with_too_few_pictures_are_named(
    plain: Path, load: Callable[[Path], Dataset]
) -> None:
    picture(plain / "rare" / "1.png", 99)
    notes = "\n".join(load(plain).notes)
    assert "1 of 3 classes have only one picture: rare" in notes
    assert "no validation picture, so the gate cannot compare them: rare" in notes


def test_new_pictures_do_not_move_old_ones_to_another_split(
    plain: Path, load: Callable[[Path], Dataset]
) -> None:
    before = load(plain)
    pictures(plain / "cat" / "new", 30, seed=50)
    pictures(plain / "bird", 30, seed=51)
    after = load(plain)
    for split in ("train", "validation", "test"):
        old, new = (set(getattr(data, split).digests) for data in (before, after))
        assert old <= new


def test_a_class_whose_pictures_are_all_held_out_trains_on_one() -> None:
    low, lower, high = "05" * 32, "01" * 32, "f0" * 32
    assert complete_split([low, lower], [0, 0], [None, None]) == ["train", "test"]
    assert complete_split([low, lower, high], [0, 0, 0], [None] * 3) == ["test", "test", "train"]


def test_validation_pictures_stay_readable_after_their_files_are_deleted(
    plain: Path, load: Callable[[Path], Dataset]
) -> None:
    data = load(plain)
    shutil.rmtree(plain)
    for index in range(len(data.validation)):
        served = decode_image(data.validation.encode(index), data.preprocess)
        np.testing.assert_array_equal(served, data.validation.pixels[index])


def test_a_colour_picture_after_grey_ones_gives_all_pictures_three_channels(
    tmp_path: Path, load: Callable[[Path], Dataset]
) -> None:
    for number in range(60):
        grey = number < 59
        path = tmp_path / "mixed" / "ab"[number % 2] / f"{number}.png"
        picture(path, number, (16, 16), "L" if grey else "RGB")
    data = load(tmp_path / "mixed")
    assert data.preprocess.mode == "RGB"
    for part in (data.train, data.validation, data.test):
        for index in range(len(part)):
            served = decode_image(part.encode(index), data.preprocess)
            np.testing.assert_array_equal(served, part.pixels[index])


def test_rows_can_be_put_in_any_order_in_place() -> None:
    draw = np.random.default_rng(0)
    for count in (1, 2, 17):
        rows = draw.integers(0, 256, (count, 2, 2, 1), dtype=np.uint8)
        before = rows.copy()
        order = draw.permutation(count)[: draw.integers(1, count + 1)].tolist()
        put_in_order(rows, order)
        np.testing.assert_array_equal(rows[: len(order)], before[order])


def test_a_data_set_that_does_not_fit_the_memory_is_refused_before_it_is_read(
    plain: Path, load: Callable[[Path], Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9 kB\nMemAvailable:  40 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    reason = r"60 files .* 46.1 kB of memory, and only 41 kB.*--image-size"
    with pytest.raises(UsageError, match=reason):
        load(plain)


def test_the_memory_limit_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo, limit, used = (tmp_path / name for name in ("meminfo", "limit", "used"))
    meminfo.write_text("MemAvailable:  4000 kB\n")
    used.write_text("600000\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "CGROUPS", ((limit, used),))
    assert memory.available_bytes() == 4_096_000
    limit.write_text("1000000\n")
    assert memory.available_bytes() == 400_000
    limit.write_text("max\n")
    assert memory.available_bytes() == 4_096_000


@pytest.mark.parametrize(
    "stat",
    [
        "anon 200000\nactive_file 100000\ninactive_file 300000\n",
        "inactive_file 5\nactive_file 5\ntotal_inactive_file 300000\ntotal_active_file 100000\n",
    ],
    ids=["v2", "v1"],
)
def test_the_page_cache_of_a_container_counts_as_available_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stat: str
) -> None:
    files = {"limit": "1000000\n", "used": "600000\n", "meminfo": "", "memory.stat": stat}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUPS", ((tmp_path / "limit", tmp_path / "used"),))
    assert memory.available_bytes() == 800_000


@pytest.mark.slow
def test_loading_takes_little_more_memory_than_the_pixels(tmp_path: Path) -> None:
    """Measures the address space that numpy and Python allocate, of which they use only a part."""
    import tracemalloc

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    for number in range(200):
        path = tmp_path / "big" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise.resize((8, 8 + number)).resize((192, 192)).save(path)
    tracemalloc.start()
    load_dataset(f"folder:{tmp_path / 'big'}", tmp_path / "cache", size_px=192)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2 * 200 * 192 * 192 * 3
