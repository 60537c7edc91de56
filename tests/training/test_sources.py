import gzip
import hashlib
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from registry.core.errors import UsageError
from registry.model.image.decode import decode_image
from registry.model.image.limits import TRUSTED_LIMITS
from tests.training.pictures import picture
from training.data import fashion_mnist
from training.data.fashion_mnist import FILES, IdxFile
from training.data.sources import Dataset, channel_statistics, load_dataset
from training.data.split import split_by_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, several formats and sizes, 80 pictures."""
    root = tmp_path / "my pictures"
    for number in range(80):
        kind = ("png", "jpg", "bmp", "webp", "tiff", "gif")[number % 6]
        size = (40 + number, 90 - number)
        picture(root / ("cat", "dog")[number % 2] / f"{number}.{kind}", number, size)
    return root


def test_the_splits_of_digits_have_no_picture_in_common(digits: Dataset) -> None:
    assert sum(digits.counts.values()) == 1797
    assert digits.preprocess.shape == (8, 8, 1)
    splits = [set(part.digests) for part in (digits.train, digits.validation, digits.test)]
    assert sum(map(len, splits)) == len(set.union(*splits))


def test_a_split_depends_on_the_digest_alone() -> None:
    digests = tuple(hashlib.sha256(bytes([n])).hexdigest() for n in range(200))
    parts = split_by_digest(digests, validation=0.2, test=0.1)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(200))
    assert 20 < len(parts["validation"]) < 60
    backwards = split_by_digest(digests[::-1], validation=0.2, test=0.1)
    assert sorted(199 - backwards["test"]) == sorted(parts["test"])


def test_channel_statistics_equal_those_that_numpy_computes() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5, 5, 3), dtype=np.uint8)
    mean, std = channel_statistics(pixels)
    np.testing.assert_allclose(mean, (pixels / 255).mean(axis=(0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(std, (pixels / 255).std(axis=(0, 1, 2)), atol=1e-6)
    assert channel_statistics(np.zeros((2, 2, 2, 1), np.uint8)) == ((0.0,), (1e-3,))


def test_a_folder_of_mixed_pictures_becomes_a_data_set(folder: Path, tmp_path: Path) -> None:
    data = load_dataset(f"folder:{folder}", tmp_path, size_px=16)
    assert data.labels == ("cat", "dog")
    assert sum(data.counts.values()) == 80
    assert data.train.pixels.shape[1:] == (16, 16, 3)
    assert data.problems == ()
    again = load_dataset(f"folder:{folder}", tmp_path, size_px=16)
    assert again.sha256 == data.sha256


def test_the_service_decodes_pictures_to_the_pixels_that_training_used(
    folder: Path, tmp_path: Path
) -> None:
    data = load_dataset(f"folder:{folder}", tmp_path, size_px=16)
    for index in range(len(data.validation)):
        served = decode_image(data.validation.encode(index), data.preprocess)
        np.testing.assert_array_equal(served, data.validation.pixels[index])


def test_a_folder_of_grey_pictures_is_read_in_one_channel(tmp_path: Path) -> None:
    for number in range(60):
        picture(tmp_path / "p" / "ab"[number % 2] / f"{number}.png", number, mode="L")
    data = load_dataset(f"folder:{tmp_path / 'p'}", tmp_path, size_px=16)
    assert data.preprocess.mode == "L"
    assert data.train.pixels.shape[3] == 1
    served = decode_image(data.test.encode(0), data.preprocess)
    np.testing.assert_array_equal(served, data.test.pixels[0])


def test_only_one_of_several_equal_pictures_is_used(folder: Path, tmp_path: Path) -> None:
    for path in list((folder / "cat").iterdir()):
        with Image.open(path) as image:  # another file, the same picture
            image.convert("RGB").save(path.with_name(f"{path.stem}-copy.bmp"))
    data = load_dataset(f"folder:{folder}", tmp_path, size_px=16)
    assert sum(data.counts.values()) == 80
    assert len({*data.train.digests, *data.validation.digests, *data.test.digests}) == 80
    assert len(data.problems) == 40
    assert all("a copy of another picture of its class" in problem for problem in data.problems)


def test_renaming_files_changes_nothing(folder: Path, tmp_path: Path) -> None:
    before = load_dataset(f"folder:{folder}", tmp_path, size_px=16)
    for number, path in enumerate(sorted((folder / "cat").iterdir(), reverse=True)):
        path.rename(path.with_name(f"renamed-{number}{path.suffix}"))
    assert load_dataset(f"folder:{folder}", tmp_path, size_px=16).sha256 == before.sha256


def test_hidden_folders_are_not_read_as_classes_or_for_pictures(
    folder: Path, tmp_path: Path
) -> None:
    picture(folder / ".ipynb_checkpoints" / "1.png", 1000)
    picture(folder / "cat" / ".thumbnails" / "1.png", 1001)
    data = load_dataset(f"folder:{folder}", tmp_path, size_px=16)
    assert data.labels == ("cat", "dog")
    assert sum(data.counts.values()) == 80


def test_training_reads_pictures_that_are_larger_than_clients_may_send(
    folder: Path, tmp_path: Path
) -> None:
    camera = folder / "cat" / "camera.jpg"
    Image.new("RGB", (4100, 3000), "red").save(camera)
    data = load_dataset(f"folder:{folder}", tmp_path, size_px=16)
    ((part, index),) = [
        (part, index)
        for part in (data.train, data.validation, data.test)
        for index in range(len(part))
        if part.encode(index) == camera.read_bytes()
    ]
    served = decode_image(part.encode(index), data.preprocess, TRUSTED_LIMITS)
    np.testing.assert_array_equal(served, part.pixels[index])


def test_files_that_cannot_be_used_are_reported_and_left_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "cat" / "notes.txt").write_text("no picture")
    (folder / "cat" / ".hidden").write_text("never read")
    (folder / "dog" / "cut.png").write_bytes((folder / "dog" / "1.jpg").read_bytes()[:200])
    picture(folder / "cat" / "same.png", 1000)
    shutil.copy(folder / "cat" / "same.png", folder / "dog" / "same.png")
    data = load_dataset(f"folder:{folder}", tmp_path, size_px=16)
    assert sum(data.counts.values()) == 80
    assert len(data.problems) == 4
    text = "\n".join(data.problems)
    for file in ("notes.txt", "cut.png", "cat/same.png", "dog/same.png"):
        assert file in text
    assert "left out 4 entries in total" in caplog.text


def one_picture_each(root: Path) -> None:
    picture(root / "a" / "a.png", 0)
    picture(root / "b" / "b.png", 1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda root: None, "is not a folder"),
        (
            lambda root: picture(root / "only" / "1.png", 1),
            "1 sub-folders.* at least two classes",
        ),
        (
            lambda root: [(root / c).mkdir(parents=True) for c in "ab"],
            "no picture that can be read",
        ),
        (
            one_picture_each,
            "no training picture of class|too few",
        ),
    ],
)
def test_the_error_about_a_folder_that_cannot_be_trained_on_gives_the_reason(
    tmp_path: Path, make: Any, reason: str
) -> None:
    make(tmp_path / "p")
    with pytest.raises(UsageError, match=reason):
        load_dataset(f"folder:{tmp_path / 'p'}", tmp_path)


@pytest.mark.parametrize("source", ["imagenet", "folder:", "digits:x", ""])
def test_an_unknown_source_is_refused_with_a_list_of_the_known_ones(
    source: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="fashion-mnist, fashion-mnist:FOLDER, digits"):
        load_dataset(source, tmp_path)


def test_an_image_size_is_refused_unless_the_source_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--image-size applies to folder"):
        load_dataset("digits", tmp_path, size_px=32)


def test_one_of_several_equal_arrays_is_used_and_none_if_their_labels_differ(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bunch = sklearn.datasets.load_digits()
    digits, labels = bunch.images, bunch.target
    copied = SimpleNamespace(
        images=np.concatenate([digits, digits[:3]]),
        target=np.concatenate([labels, labels[:2], [labels[2] + 1]]),
    )
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: copied)
    assert sum(load_dataset("digits", tmp_path).counts.values()) == 1796


# The sources of Fashion-MNIST, tested with files of the same format and 1 % of the pictures.


@pytest.fixture
def small_fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four small IDX files; the module is patched to expect their digests."""
    source = tmp_path / "published"
    source.mkdir()
    random = np.random.default_rng(0)
    small = []
    for file in FILES:
        shape = (file.shape[0] // 100, *file.shape[1:])
        limit = 256 if len(shape) == 3 else 10
        content = bytes(file.header_bytes) + random.integers(0, limit, shape, np.uint8).tobytes()
        (source / file.name).write_bytes(gzip.compress(content))
        digest = hashlib.sha256(content).hexdigest()
        small.append(IdxFile(file.name, digest, file.header_bytes, shape))
    monkeypatch.setattr(fashion_mnist, "FILES", tuple(small))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "not installed")
    return source


def no_source(folder: Path) -> None:
    raise UsageError("this source is down")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "download_from_publisher", no_source)
    monkeypatch.setattr(fashion_mnist, "download_from_debian", no_source)


@pytest.mark.usefixtures("offline")
def test_a_folder_that_the_user_names_is_read_first(small_fashion: Path, tmp_path: Path) -> None:
    data = load_dataset(f"fashion-mnist:{small_fashion}", tmp_path)
    assert sum(data.counts.values()) == 700
    assert data.counts["test"] == 100
    assert data.labels[9] == "Ankle boot"
    assert 20 < data.counts["validation"] < 90


@pytest.mark.usefixtures("offline")
def test_the_installed_debian_package_is_used(
    small_fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", small_fashion)
    assert load_dataset("fashion-mnist", tmp_path / "cache").counts["test"] == 100
    assert not (tmp_path / "cache").exists()


def test_a_download_is_kept_and_used_again(
    small_fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "PUBLISHER", small_fashion.as_uri() + "/")
    cache = tmp_path / "cache"
    first = load_dataset("fashion-mnist", cache)
    monkeypatch.setattr(fashion_mnist, "download_from_publisher", no_source)
    monkeypatch.setattr(fashion_mnist, "download_from_debian", no_source)
    assert load_dataset("fashion-mnist", cache).sha256 == first.sha256
    assert [path.name for path in cache.iterdir()] == ["fashion-mnist"]


def test_a_corrupt_download_is_not_kept(
    small_fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_fashion / FILES[2].name).write_bytes(gzip.compress(b"something else"))
    monkeypatch.setattr(fashion_mnist, "PUBLISHER", small_fashion.as_uri() + "/")
    monkeypatch.setattr(fashion_mnist, "download_from_debian", no_source)
    with pytest.raises(UsageError, match="is damaged: its content has sha256"):
        load_dataset("fashion-mnist", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not gzip", gzip.compress(b"x" * 1000, mtime=0)[:-20]])
@pytest.mark.usefixtures("offline")
def test_a_damaged_file_in_a_named_folder_is_named(
    small_fashion: Path, tmp_path: Path, content: bytes
) -> None:
    (small_fashion / FILES[0].name).write_bytes(content)
    with pytest.raises(UsageError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        load_dataset(f"fashion-mnist:{small_fashion}", tmp_path)
    (small_fashion / FILES[0].name).unlink()
    with pytest.raises(UsageError, match=r"train-images-idx3-ubyte\.gz is missing"):
        load_dataset(f"fashion-mnist:{small_fashion}", tmp_path)


@pytest.mark.usefixtures("offline")
def test_the_error_without_any_source_lists_all_that_were_tried(
    small_fashion: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"fashion-mnist:FOLDER\. Tried: .*down.*down"):
        load_dataset("fashion-mnist", tmp_path / "cache")


def test_debians_package_is_downloaded_and_unpacked(
    small_fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses a fake apt-get that fails until ``apt-get update`` has been called."""
    tree = tmp_path / "package"
    target = tree / fashion_mnist.DEBIAN_FOLDER.relative_to("/")
    shutil.copytree(small_fashion, target)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\n"
        "Maintainer: test <test@example.org>\nDescription: test\n"
    )
    package = tmp_path / "dataset-fashion-mnist_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", tree, package], check=True, capture_output=True)
    commands = tmp_path / "bin"
    commands.mkdir()
    apt = commands / "apt-get"
    apt.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *update*) touch {tmp_path}/updated; exit 0;; esac\n'
        f"[ -e {tmp_path}/updated ] || exit 100\n"
        f'case "$*" in *--print-uris*) echo "\'http://x\' name {package.stat().st_size} SHA";;\n'
        f"*) cp {package} . ;; esac\n"
    )
    apt.chmod(0o755)
    import os

    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setattr(fashion_mnist, "download_from_publisher", no_source)
    assert load_dataset("fashion-mnist", tmp_path / "cache").counts["test"] == 100


def test_without_apt_the_download_from_debian_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="not installed"):
        fashion_mnist.download_from_debian(tmp_path)


def test_an_unreachable_publisher_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "PUBLISHER", "http://127.0.0.1:9/")
    with pytest.raises(UsageError, match="cannot be reached"):
        fashion_mnist.download_from_publisher(tmp_path)


def test_the_data_sets_digest_changes_with_a_label(digits: Dataset) -> None:
    labels = digits.test.labels.copy()
    labels[0] = (labels[0] + 1) % 10
    changed = msgspec.structs.replace(
        digits, test=msgspec.structs.replace(digits.test, labels=labels)
    )
    assert changed.sha256 != digits.sha256
