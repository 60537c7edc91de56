import io
from pathlib import Path

import msgspec
import numpy as np
import pytest

from registry.bundle import (
    HELDOUT,
    MANIFEST,
    THUMBNAILS,
    WEIGHTS,
    fsync_tree,
    open_bundle,
    to_npz,
    write_bundle,
)
from registry.contract import FileEntry
from registry.errors import BundleInvalid
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


def test_golden_images_show_every_class_in_turn(make_bundle: MakeBundle) -> None:
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
def test_damaged_weights_are_refused(make_bundle: MakeBundle, damage, reason: str) -> None:
    bundle = make_bundle()
    path = bundle.folder / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BundleInvalid, match=reason):
        bundle.weights()


def test_a_missing_file_is_named(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    (bundle.folder / WEIGHTS).unlink()
    with pytest.raises(BundleInvalid, match=r"weights\.safetensors: No such file"):
        bundle.verify()
    with pytest.raises(BundleInvalid, match="names no file"):
        bundle.read("unheard.of")
    with pytest.raises(BundleInvalid, match="No such file"):
        open_bundle(bundle.folder / "elsewhere")


def test_a_manifest_that_the_registry_does_not_know_is_refused(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    with pytest.raises(BundleInvalid, match="the registry says"):
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
def test_files_that_are_not_what_they_are_called_are_refused(
    make_bundle: MakeBundle, tmp_path: Path, file: str, method: str
) -> None:
    bundle = make_bundle()
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    wrong = write_bundle(tmp_path / "wrong", bundle.manifest, {**files, file: b"not this format"})
    with pytest.raises(BundleInvalid, match=file.split("/")[-1]):
        getattr(wrong, method)()


def bare(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


ONES = np.ones((2, 10), np.float32) / 10
HOSTILE_ARRAYS = {
    "nothing": b"",
    "no zip behind its mark": b"PK\x03\x04" + bytes(40),
    "one array": bare(np.zeros(2)),
    "other names": to_npz(x=np.zeros(2)),
    "probabilities of one dimension": to_npz(labels=np.zeros(2, int), probabilities=np.zeros(2)),
    "of other classes": to_npz(labels=np.zeros(2, int), probabilities=ONES[:, :9]),
    "of other pictures": to_npz(labels=np.zeros(3, int), probabilities=ONES),
    "a label beyond the last": to_npz(labels=np.array([0, 10]), probabilities=ONES),
    "a label before the first": to_npz(labels=np.array([0, -1]), probabilities=ONES),
    "labels that are no numbers": to_npz(labels=np.array(["a", "b"]), probabilities=ONES),
    "no picture at all": to_npz(labels=np.zeros(0, int), probabilities=ONES[:0]),
}


@pytest.mark.parametrize("data", HOSTILE_ARRAYS.values(), ids=HOSTILE_ARRAYS)
def test_held_out_records_that_fit_no_model_are_refused(
    make_bundle: MakeBundle, tmp_path: Path, data: bytes
) -> None:
    bundle = make_bundle()
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    wrong = write_bundle(tmp_path / "wrong", bundle.manifest, {**files, HELDOUT: data})
    with pytest.raises(BundleInvalid, match=HELDOUT):
        wrong.heldout()
    pixels = {**files, THUMBNAILS: to_npz(pixels=np.zeros((2, 8, 8, 2), np.uint8))}
    with pytest.raises(BundleInvalid, match="are no pictures"):
        write_bundle(tmp_path / "pixels", bundle.manifest, pixels).thumbnails()
