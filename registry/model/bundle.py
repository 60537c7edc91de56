"""A bundle: all files of one model version in one folder. The manifest lists each with its digest.

No file in it can run code: JSON, safetensors, encoded pictures, ``.npz`` read without pickle, and
the network as a graph of operations that the engines themselves implement. ``Bundle.read`` returns
the same bytes whose digest it checked, so a file cannot change between the check and the use.
Imports neither torch nor MLflow.
"""

import copy
import io
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from msgspec import Struct
from numpy.lib import format as npy
from numpy.typing import NDArray

from registry.core.errors import BundleInvalid
from registry.core.names import sha256_hex
from registry.model.graphs.onnx_rules import check_onnx
from registry.model.heldout import Heldout, TrainingRecord
from registry.model.manifest import FileEntry, LaterEvaluation, Manifest, manifest_from_json

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
GOLDEN = "golden/golden.json"
HELDOUT = "heldout.npz"
TRAINING = "training.npz"
CHAMPION_SCORES = "champion.npz"
THUMBNAILS = "thumbnails.npz"
# The network with its weights, for engines other than torch. A version may lack some or all.
ONNX_GRAPH = "exports/network.onnx"
INT8_GRAPH, INT8_WEIGHTS = "exports/int8.xml", "exports/int8.bin"
# Rounding may lift a probability above 1. In half precision the next number is 1 + 2⁻¹⁰.
ROUNDING = 1e-3
# The arrays of one file may take so much memory: enough for 65,000 examples of 1,000 classes.
MAX_ARRAYS_BYTES = 256 * 1024 * 1024


class GoldenImage(Struct, frozen=True):
    """One encoded held-out picture of the bundle, and its published fp32 probabilities."""

    file: str
    probabilities: tuple[float, ...]


class Bundle:
    """An opened bundle: its manifest, and its files, each checked when it is read.

    It has many methods because each kind of file is read by one of them.
    """

    def __init__(self, folder: Path, manifest_bytes: bytes) -> None:
        self.folder = folder
        self.manifest = manifest_from_json(manifest_bytes)
        self.manifest_sha256 = sha256_hex(manifest_bytes)
        for name in self.manifest.files:
            _check_name(name)

    def with_evaluation(self, evaluation: LaterEvaluation) -> "Bundle":
        """This bundle with the held-out record of ``evaluation``, whose files are in its folder.

        Its digest stays that of the version.
        """
        extended = copy.copy(self)
        extended.manifest = msgspec.structs.replace(
            self.manifest,
            scored_champion=evaluation.scored_champion,
            files={**self.manifest.files, **evaluation.files},
        )
        return extended

    def read(self, name: str) -> bytes:
        """The bytes of the file ``name``, after their digest was checked.

        Raises:
            BundleInvalid: the file is not in the manifest, is missing on disk, or differs from what
                was published.
        """
        return read_digested(self.folder / name, self.entry(name).sha256)

    def entry(self, name: str) -> FileEntry:
        """The manifest's entry for the file ``name``; ``BundleInvalid`` if there is none."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleInvalid(f"{self.folder}: the manifest names no file {name}")
        return entry

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Check ``names``, by default every file; ``BundleInvalid`` if a file is wrong."""
        for name in self.manifest.files if names is None else names:
            self.read(name)

    def serving_files(self) -> list[str]:
        """Names of the files that serving needs: weights, exported graphs, golden images."""
        return [
            name
            for name in self.manifest.files
            if name == WEIGHTS or name.startswith(("exports/", "golden/"))
        ]

    def weights(self) -> dict[str, NDArray[Any]]:
        """The network's weights: name of a parameter → array."""
        try:
            return safetensors.numpy.load(self.read(WEIGHTS))
        except safetensors.SafetensorError as error:
            raise BundleInvalid(f"{self.folder / WEIGHTS}: {error}") from error

    def graph(self, name: str) -> bytes:
        """The bytes of an exported graph that keeps the rules of ``onnx_rules``.

        An engine would read the files that a graph refers to, without a check of their digests.

        Raises:
            BundleInvalid: as for ``read``; or the graph is not in the format of its name (an engine
                might read it nevertheless); or it breaks a rule.
        """
        graph = self.read(name)
        if name == INT8_GRAPH and not graph.startswith(b"<?xml"):
            raise BundleInvalid(f"{self.folder / name} is not in OpenVINO's format")
        if name == ONNX_GRAPH:
            try:
                check_onnx(graph)
            except BundleInvalid as error:
                raise BundleInvalid(f"{self.folder / name}: {error}") from None
        return graph

    def golden(self) -> list[GoldenImage]:
        """The golden images and their published probabilities."""
        try:
            return msgspec.json.decode(self.read(GOLDEN), type=list[GoldenImage])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise BundleInvalid(f"{self.folder / GOLDEN}: {error}") from error

    def heldout(self) -> Heldout:
        """The held-out examples and their scores; ``BundleInvalid`` if they do not fit together."""
        arrays = self._arrays(HELDOUT, "labels", "probabilities", "digests", "perceptual_hashes")
        labels, probabilities = arrays["labels"], arrays["probabilities"]
        classes = len(self.manifest.labels)
        fits = (
            labels.dtype.kind in "iu"
            and probabilities.dtype.kind == "f"
            and labels.ndim == 1
            and labels.size > 0
            and probabilities.shape == (labels.size, classes)
            and 0 <= labels.min() <= labels.max() < classes
        )
        if not fits:
            raise BundleInvalid(
                f"{self.folder / HELDOUT}: labels {labels.dtype}{labels.shape} and probabilities "
                f"{probabilities.dtype}{probabilities.shape} do not fit {classes} classes"
            )
        digests, perceptual_hashes = arrays["digests"], arrays["perceptual_hashes"]
        if digests.dtype != np.uint8 or digests.shape != (labels.size, 32):
            raise BundleInvalid(
                f"{self.folder / HELDOUT}: digests {digests.dtype}{digests.shape} are not the "
                f"SHA-256 of {labels.size} examples"
            )
        _check_words(self.folder / HELDOUT, perceptual_hashes, (labels.size,))
        _check_range(self.folder / HELDOUT, probabilities)
        return Heldout(labels, probabilities, digests, perceptual_hashes)

    def training(self) -> TrainingRecord:
        """The record of the training examples; ``BundleInvalid`` if an array has another form.

        It is empty if an imported version does not know them.
        """
        if self.manifest.imported and TRAINING not in self.manifest.files:
            return TrainingRecord(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        arrays = self._arrays(TRAINING, "digests", "perceptual_hashes")
        digests, perceptual_hashes = arrays["digests"], arrays["perceptual_hashes"]
        _check_words(self.folder / TRAINING, digests, (digests.size,))
        _check_words(self.folder / TRAINING, perceptual_hashes, digests.shape)
        return TrainingRecord(digests, perceptual_hashes)

    def champion_scores(
        self, manifest_sha256: str, shape: tuple[int, int]
    ) -> NDArray[np.float32] | None:
        """The champion's scores on the held-out examples of this bundle.

        Training stores them when it publishes a version: those of the champion at that moment.

        Args:
            manifest_sha256: digest of the manifest of the version whose scores are wanted.
            shape: (held-out examples of this bundle, classes of that version).

        Returns:
            float32 of ``shape``; None if the bundle has no scores, or those of another version.

        Raises:
            BundleInvalid: the scores have another shape, or one is outside 0 … 1.
        """
        if self.manifest.scored_champion != manifest_sha256:
            return None
        scores = self._arrays(CHAMPION_SCORES, "probabilities")["probabilities"]
        if scores.dtype.kind != "f" or scores.shape != shape:
            raise BundleInvalid(
                f"{self.folder / CHAMPION_SCORES}: probabilities {scores.dtype}{scores.shape} are "
                f"not of {shape[0]} examples and {shape[1]} classes"
            )
        _check_range(self.folder / CHAMPION_SCORES, scores)
        return scores

    def thumbnails(self) -> NDArray[np.uint8]:
        """Small pictures of the first held-out examples for people, uint8 (N, H, W, C).

        N is 0 if the version was published without thumbnails.
        """
        if THUMBNAILS not in self.manifest.files:
            return np.zeros((0, 1, 1, 1), np.uint8)
        pixels = self._arrays(THUMBNAILS, "pixels")["pixels"]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
            raise BundleInvalid(
                f"{self.folder / THUMBNAILS}: {pixels.dtype}{pixels.shape} are not pictures; "
                "expected uint8 (N, H, W, 1 or 3)"
            )
        return pixels

    def _arrays(self, file: str, *names: str) -> dict[str, NDArray[Any]]:
        return _unpack(self.folder / file, self.read(file), names)


def _check_words(path: Path, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.dtype != np.uint64 or array.shape != shape:
        raise BundleInvalid(f"{path}: digests are {array.dtype}{array.shape}, not uint64{shape}")


def _check_range(path: Path, probabilities: NDArray[Any]) -> None:
    """Refuse probabilities outside 0 … 1. NaN passes here.

    The gate refuses NaN, and its message names the version to publish again.
    """
    outside = probabilities[(probabilities < 0) | (probabilities > 1 + ROUNDING)]
    if outside.size:
        raise BundleInvalid(
            f"{path}: {outside.size:,} probabilities are outside 0 … 1; the first is {outside[0]:g}"
        )


def _unpack(path: Path, data: bytes, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The arrays ``names`` of ``data``, the ``.npz`` file at ``path``, if they are small enough."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_unpacked(archive, names)
            return {name: _read_array(archive, name) for name in names}
    except Exception as error:  # zipfile and zlib raise many kinds of errors for damaged files
        raise BundleInvalid(f"{path}: {error}") from error


def _check_unpacked(archive: zipfile.ZipFile, names: Iterable[str]) -> None:
    """Raise ``ValueError`` if the arrays ``names`` would unpack to more than the limit."""
    size_bytes = sum(archive.getinfo(f"{name}.npy").file_size for name in names)
    if size_bytes > MAX_ARRAYS_BYTES:
        raise ValueError(
            f"it would unpack to {size_bytes:,} bytes; at most {MAX_ARRAYS_BYTES:,} are accepted"
        )


def _read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """One array of the archive, after a check that its header fits the size of its member.

    numpy allocates the size in the header before it reads. ``zipfile`` never reads more than a
    member's declared size.
    """
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is neither stored nor compressed with deflate")
    with archive.open(member) as file:
        if npy.read_magic(file) != (1, 0):
            raise ValueError(f"{member.filename} is not in version 1.0 of numpy's format")
        shape, _, dtype = npy.read_array_header_1_0(file)
        if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError(f"{member.filename} does not have the size of {dtype}{shape}")
    with archive.open(member) as file:
        array: NDArray[Any] = npy.read_array(file, allow_pickle=False)
    return array


def to_npz(**arrays: NDArray[Any]) -> bytes:
    """The content of an ``.npz`` file with ``arrays``."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def write_bundle(folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Write ``files`` and a manifest that lists them into ``folder``; return the opened bundle.

    The manifest is written last, so that an unfinished folder is not taken for a bundle.
    """
    entries = {name: FileEntry(sha256_hex(data), len(data)) for name, data in files.items()}
    for name, data in files.items():
        _check_name(name)
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    manifest_bytes = msgspec.structs.replace(manifest, files=entries).to_json()
    (folder / MANIFEST).write_bytes(manifest_bytes)
    return Bundle(folder, manifest_bytes)


def with_manifest(bundle: Bundle, manifest: Manifest) -> Bundle:
    """``bundle`` with ``manifest`` in place of its own, over the same files. Written in place."""
    manifest_bytes = msgspec.structs.replace(manifest, files=bundle.manifest.files).to_json()
    (bundle.folder / MANIFEST).write_bytes(manifest_bytes)
    return Bundle(bundle.folder, manifest_bytes)


def open_bundle(folder: Path, expected_sha256: str | None = None) -> Bundle:
    """The bundle in ``folder``. Its other files are checked when they are read.

    Args:
        folder: the folder with ``manifest.json``.
        expected_sha256: the manifest's digest in the registry.

    Raises:
        BundleInvalid: the manifest is missing, cannot be read, or has another digest.
    """
    try:
        manifest_bytes = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleInvalid(f"{folder / MANIFEST}: {error.strerror}") from error
    found = sha256_hex(manifest_bytes)
    if expected_sha256 is not None and found != expected_sha256:
        raise BundleInvalid(
            f"{folder / MANIFEST} has sha256 {found[:12]}…, but the registry has "
            f"{expected_sha256[:12]}…"
        )
    return Bundle(folder, manifest_bytes)


def read_digested(path: Path, sha256: str | None) -> bytes:
    """The content of ``path``, whose digest is ``sha256``.

    Raises:
        BundleInvalid: the file cannot be read, or has another digest.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleInvalid(f"{path}: {error.strerror}") from error
    if (found := sha256_hex(data)) != sha256:
        raise BundleInvalid(
            f"{path} ({len(data)} bytes) has sha256 {found[:12]}…, not {str(sha256)[:12]}…"
        )
    return data


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder under ``folder``, so that a later rename survives a crash."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_name(name: str) -> None:
    """Refuse names that lead out of the bundle's folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or name == MANIFEST:
        raise BundleInvalid(f"the manifest names a file {name!r} outside the bundle")
