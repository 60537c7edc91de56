import io
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.lib import format as npy

from registry.core.errors import BundleInvalid
from registry.model.bundle import (
    CHAMPION_SCORES,
    HELDOUT,
    MANIFEST,
    THUMBNAILS,
    TRAINING,
    WEIGHTS,
    Bundle,
    fsync_tree,
    open_bundle,
    to_npz,
    write_bundle,
)
from registry.model.manifest import FileEntry
from tests.conftest import MakeBundle


def test_a_bundle_is_written_and_opened_again(make_bundle: MakeBundle) -> None:
    written = make_bundle()
    opened = open_bundle(written.folder, written.manifest_sha256)
    opened.verify()
    fsync_tree(opened.folder)
    assert opened.manifest == written.manifest
    assert WEIGHTS in opened.serving_files()
    assert not [name for name in opened.serving_files() if name.startswith("report")]
    heldout = opened.heldout()
    assert heldout.probabilities.shape == (64, 10)
    assert heldout.labels.shape == (64,)
    np.testing.assert_allclose(heldout.probabilities.sum(axis=1), 1, atol=1e-5)


def test_golden_images_take_the_classes_in_turn(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    assert len(bundle.golden()) == 32
    heldout = bundle.heldout()
    rows = {
        tuple(row): label
        for row, label in zip(heldout.probabilities.tolist(), heldout.labels, strict=True)
    }
    labels = [rows[golden.probabilities] for golden in bundle.golden()]
    assert labels[:10] == list(range(10))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "has sha256"),
        (lambda data: data[:-1], r"bytes\) has sha256"),
        (lambda data: data + b"\0", r"bytes\) has sha256"),
    ],
)
def test_damaged_weights_are_refused(make_bundle: MakeBundle, damage: Any, reason: str) -> None:
    bundle = make_bundle()
    path = bundle.folder / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BundleInvalid, match=reason):
        bundle.weights()


def test_the_error_for_a_missing_file_names_it(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    (bundle.folder / WEIGHTS).unlink()
    with pytest.raises(BundleInvalid, match=r"weights\.safetensors: No such file"):
        bundle.verify()
    with pytest.raises(BundleInvalid, match="names no file"):
        bundle.read("unknown.file")
    with pytest.raises(BundleInvalid, match="No such file"):
        open_bundle(bundle.folder / "elsewhere")


def test_a_manifest_with_another_digest_than_in_the_registry_is_refused(
    make_bundle: MakeBundle,
) -> None:
    bundle = make_bundle()
    with pytest.raises(BundleInvalid, match="but the registry has"):
        open_bundle(bundle.folder, "0" * 64)


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/../../b", "a\\b", MANIFEST])
def test_files_outside_the_bundle_are_refused(
    make_bundle: MakeBundle, tmp_path: Path, name: str
) -> None:
    manifest = make_bundle().manifest
    with pytest.raises(BundleInvalid, match="outside the bundle"):
        write_bundle(tmp_path / "new", manifest, {name: b""})
    evil = msgspec.structs.replace(manifest, files={name: FileEntry("0" * 64, 0)})
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / MANIFEST).write_bytes(evil.to_json())
    with pytest.raises(BundleInvalid, match="outside the bundle"):
        open_bundle(tmp_path / "evil")


@pytest.mark.parametrize(
    ("file", "method"),
    [(WEIGHTS, "weights"), ("golden/golden.json", "golden"), ("heldout.npz", "heldout")],
)
def test_files_in_another_format_than_their_names_say_are_refused(
    make_bundle: MakeBundle, tmp_path: Path, file: str, method: str
) -> None:
    bundle = make_bundle()
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    wrong = write_bundle(tmp_path / "wrong", bundle.manifest, {**files, file: b"not this format"})
    with pytest.raises(BundleInvalid, match=file.split("/")[-1]):
        getattr(wrong, method)()


def single_array(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


ONES = np.ones((2, 10), np.float32) / 10
TWO = np.zeros(2, int)
NAMES = np.zeros((2, 32), np.uint8)
PERCEPTUAL_HASHES = np.zeros(2, np.uint64)


def record(labels: np.ndarray = TWO, probabilities: np.ndarray = ONES, **others: Any) -> bytes:
    arrays = {"digests": NAMES, "perceptual_hashes": PERCEPTUAL_HASHES, **others}
    return to_npz(labels=labels, probabilities=probabilities, **arrays)


HOSTILE_ARRAYS = {
    "nothing": b"",
    "a zip header without an archive": b"PK\x03\x04" + bytes(40),
    "an array without an archive": single_array(np.zeros(2)),
    "arrays with other names": to_npz(x=np.zeros(2)),
    "probabilities of one dimension": record(probabilities=np.zeros(2)),
    "too few classes": record(probabilities=ONES[:, :9]),
    "more labels than probabilities": record(np.zeros(3, int)),
    "a label beyond the last": record(np.array([0, 10])),
    "a label before the first": record(np.array([0, -1])),
    "labels that are not numbers": record(np.array(["a", "b"])),
    "no examples": record(np.zeros(0, int), ONES[:0]),
    "a probability below 0": record(probabilities=ONES - np.float32(0.2)),
    "a probability above 1": record(probabilities=ONES * np.float32(1e30)),
    "too few digests": record(digests=NAMES[:1]),
    "digests that are cut": record(digests=NAMES[:, :8]),
    "perceptual hashes that are floats": record(perceptual_hashes=PERCEPTUAL_HASHES.astype(float)),
}


@pytest.fixture
def changed(make_bundle: MakeBundle, tmp_path: Path) -> Callable[[str, bytes], Bundle]:
    """A function that writes a bundle with ``data`` in one file, and its digest in the manifest."""

    def change(file: str, data: bytes) -> Bundle:
        bundle = make_bundle()
        files = {name: bundle.read(name) for name in bundle.manifest.files}
        return write_bundle(tmp_path / "changed", bundle.manifest, {**files, file: data})

    return change


def test_the_record_from_which_the_hostile_ones_are_made_is_accepted(
    changed: Callable[[str, bytes], Bundle],
) -> None:
    assert changed(HELDOUT, record()).heldout().accuracy == 1.0


@pytest.mark.parametrize("data", HOSTILE_ARRAYS.values(), ids=HOSTILE_ARRAYS)
def test_hostile_held_out_records_are_refused(
    changed: Callable[[str, bytes], Bundle], data: bytes
) -> None:
    with pytest.raises(BundleInvalid, match=HELDOUT):
        changed(HELDOUT, data).heldout()


def test_thumbnails_and_training_records_of_another_form_are_refused(
    changed: Callable[[str, bytes], Bundle],
) -> None:
    with pytest.raises(BundleInvalid, match="are not pictures"):
        changed(THUMBNAILS, to_npz(pixels=np.zeros((2, 8, 8, 2), np.uint8))).thumbnails()
    with pytest.raises(BundleInvalid, match=TRAINING):
        changed(
            TRAINING, to_npz(digests=PERCEPTUAL_HASHES, perceptual_hashes=PERCEPTUAL_HASHES[:1])
        ).training()


def test_champion_scores_must_be_those_of_the_wanted_version_and_of_all_examples(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle = make_bundle()
    assert bundle.champion_scores("1" * 64, (64, 10)) is None
    manifest = msgspec.structs.replace(bundle.manifest, scored_champion="1" * 64)
    files = {CHAMPION_SCORES: to_npz(probabilities=ONES)}
    scored = write_bundle(tmp_path / "scored", manifest, files)
    found = scored.champion_scores("1" * 64, (2, 10))
    assert found is not None
    assert np.array_equal(found, ONES)
    assert scored.champion_scores("2" * 64, (2, 10)) is None
    with pytest.raises(BundleInvalid, match="not of 3 examples and 10 classes"):
        scored.champion_scores("1" * 64, (3, 10))
    wrong = {CHAMPION_SCORES: to_npz(probabilities=-ONES)}
    below = write_bundle(tmp_path / "below", manifest, wrong)
    with pytest.raises(
        BundleInvalid, match=r"20 probabilities are outside 0 … 1; the first is -0\.1"
    ):
        below.champion_scores("1" * 64, (2, 10))


def bomb(bomb_name: str, shape: tuple[int, ...], size_bytes: int) -> bytes:
    """An ``.npz`` with all arrays that a bundle may have; each header claims ``shape``.

    ``size_bytes`` zeros follow the header of ``bomb_name``, compressed to a thousandth of that.
    """
    buffer = io.BytesIO()
    header = io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    zeros = bytes(1 << 20)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("labels", "probabilities", "digests", "perceptual_hashes", "pixels"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(header.getvalue())
                for _ in range(size_bytes >> 20 if name == bomb_name else 0):
                    member.write(zeros)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("file", "name", "method", "size_mib"),
    [(HELDOUT, "labels", "heldout", 1100), (THUMBNAILS, "pixels", "thumbnails", 260)],
)
def test_a_megabyte_that_would_unpack_to_more_than_a_gigabyte_is_never_unpacked(
    changed: Callable[[str, bytes], Bundle], file: str, name: str, method: str, size_mib: int
) -> None:
    data = bomb(name, (size_mib << 20,), size_mib << 20)
    assert len(data) < 1_500_000
    bundle = changed(file, data)
    tracemalloc.start()
    with pytest.raises(BundleInvalid, match=r"would unpack to [\d,]{11,} bytes; at most"):
        getattr(bundle, method)()
    assert tracemalloc.get_traced_memory()[1] < 16_000_000
    tracemalloc.stop()


def test_no_memory_is_allocated_for_a_header_that_claims_more_than_its_file_has(
    changed: Callable[[str, bytes], Bundle],
) -> None:
    bundle = changed(HELDOUT, bomb("labels", (1 << 40,), 1 << 20))
    tracemalloc.start()
    with pytest.raises(BundleInvalid, match="does not have the size of uint8"):
        bundle.heldout()
    assert tracemalloc.get_traced_memory()[1] < 16_000_000
    tracemalloc.stop()


def test_a_member_is_not_unpacked_beyond_its_declared_size(
    changed: Callable[[str, bytes], Bundle],
) -> None:
    """The archive's directory declares 2,000 bytes; the compressed stream has millions."""
    data = bomb("labels", (8 << 20,), 8 << 20)
    size = struct.pack("<L", (8 << 20) + 128)
    assert data.count(size) >= 2
    with pytest.raises(BundleInvalid, match=HELDOUT):
        changed(HELDOUT, data.replace(size, struct.pack("<L", 2000))).heldout()
