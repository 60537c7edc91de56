"""Broken or malicious bundles, by name.

Each function changes a good bundle on disk. Some would create a marker file if code from the
bundle ran. ``replace_file`` also writes the new digest to the manifest, as an attacker with write
access to the registry could.
"""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from registry.core.names import sha256_hex
from registry.model.bundle import GOLDEN, HELDOUT, MANIFEST, WEIGHTS, Bundle

Change = Callable[[Bundle, Path], object]


class Marker:
    """Creates the file ``path`` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self._path,)  # type: ignore[return-value]


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Marker(marker))


def torch_archive(marker: Path) -> bytes:
    """A file like ``torch.save`` writes, with a pickled ``Marker`` in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(marker))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def object_array(marker: Path) -> bytes:
    """An ``.npz`` whose arrays contain objects, so that they are pickled."""
    buffer = io.BytesIO()
    objects = np.array([Marker(marker)], dtype=object)
    names = ("pixels", "labels", "probabilities", "digests", "perceptual_hashes")
    arrays: dict[str, Any] = dict.fromkeys(names, objects)
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def header(text: str, payload: bytes = b"") -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data + payload


def replace_file(bundle: Bundle, name: str, data: bytes) -> None:
    """Write ``data`` to the file ``name``, and its digest to the manifest."""
    (bundle.folder / name).write_bytes(data)
    entry = {"sha256": sha256_hex(data), "size_bytes": len(data)}
    change_manifest(bundle, lambda manifest: manifest["files"].update({name: entry}))


def change_manifest(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> None:
    file = bundle.folder / MANIFEST
    manifest = json.loads(file.read_bytes())
    change(manifest)
    file.write_text(json.dumps(manifest))


def weights(make: Callable[[Path], bytes]) -> Change:
    return lambda bundle, marker: replace_file(bundle, WEIGHTS, make(marker))


def manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda bundle, marker: change_manifest(bundle, change)


def outside(bundle: Bundle, marker: Path) -> None:
    """Replace the weights by a link to a file outside the bundle."""
    (bundle.folder / WEIGHTS).unlink()
    (bundle.folder / WEIGHTS).symlink_to("/etc/hostname")


def mlmodel(bundle: Bundle, marker: Path) -> None:
    """Add a module that MLflow's loader would import, and cut the weights, so that a load fails."""
    (bundle.folder / "code").mkdir()
    (bundle.folder / "code" / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    (bundle.folder / "MLmodel").write_text(
        "flavors:\n  python_function:\n    loader_module: evil\n    code: code\n"
    )
    (bundle.folder / WEIGHTS).write_bytes((bundle.folder / WEIGHTS).read_bytes()[:-1])


def nan_weights(bundle: Bundle, marker: Path) -> None:
    import safetensors.numpy

    arrays = {name: np.full_like(array, np.nan) for name, array in bundle.weights().items()}
    replace_file(bundle, WEIGHTS, safetensors.numpy.save(arrays))


def other_weights(bundle: Bundle, marker: Path) -> None:
    import safetensors.numpy

    arrays = {name: array[::-1].copy() for name, array in bundle.weights().items()}
    replace_file(bundle, WEIGHTS, safetensors.numpy.save(arrays))


def huge_network(bundle: Bundle, marker: Path) -> None:
    change_manifest(
        bundle, lambda m: m["network"].update(name="dense", args={"hidden": [2_000_000_000]})
    )


def hostile_golden(bundle: Bundle, marker: Path) -> None:
    from tests.hostile_pictures import HOSTILE

    golden = json.loads(bundle.read(GOLDEN))
    replace_file(bundle, golden[0]["file"], HOSTILE["jpeg of 5,000 scans"]())


HOSTILE_BUNDLES: dict[str, Change] = {
    "weights are a pickle": weights(pickled),
    "weights are a torch archive": weights(torch_archive),
    "weights are nothing": weights(lambda marker: b""),
    "weights' header is 2⁶³ long": weights(lambda marker: struct.pack("<Q", 2**63) + b"{}"),
    "weights' header is not JSON": weights(lambda marker: header("{" * 5000)),
    "weights' offsets lie": weights(
        lambda marker: header(
            '{"x":{"dtype":"F32","shape":[99999999],"data_offsets":[0,399999996]}}', bytes(8)
        )
    ),
    "weights are those of another network": weights(
        lambda marker: header('{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8))
    ),
    "weights are NaN": nan_weights,
    "weights are turned round": other_weights,
    "weights are a link to elsewhere": outside,
    "an MLmodel that brings code": mlmodel,
    "held-out scores are an array of objects": lambda bundle, marker: replace_file(
        bundle, HELDOUT, object_array(marker)
    ),
    "manifest is not JSON": lambda bundle, marker: (bundle.folder / MANIFEST).write_bytes(
        b"[" * 100_000
    ),
    "manifest is missing": lambda bundle, marker: (bundle.folder / MANIFEST).unlink(),
    "manifest names a file outside": manifest(
        lambda m: m["files"].update({"../../x": {"sha256": "0" * 64, "size_bytes": 1}})
    ),
    "manifest is of another schema": manifest(lambda m: m.update(schema_version=99)),
    "manifest has an unknown member": manifest(lambda m: m.update(loader="evil")),
    "network is not on our list": manifest(lambda m: m["network"].update(name="os.system")),
    "network has other arguments": manifest(lambda m: m["network"].update(args={"evil": 1})),
    "network would need 10¹⁶ bytes": huge_network,
    "network of a million blocks": manifest(
        lambda m: m["network"].update(name="resnet", args={"widths": [1], "blocks": 1_000_000})
    ),
    "pictures of 4096×4096": manifest(
        lambda m: m["preprocess"].update(width_px=4096, height_px=4096)
    ),
    "pictures of 2³¹ pixels": manifest(lambda m: m["preprocess"].update(width_px=2**31)),
    "mean is NaN": manifest(lambda m: m["preprocess"].update(mean=[float("nan")])),
    "labels are swapped": manifest(lambda m: m["labels"].reverse()),
    "labels are too few": manifest(lambda m: m["labels"].pop()),
    "golden picture is hostile": hostile_golden,
    "golden probabilities are not numbers": lambda bundle, marker: replace_file(
        bundle, GOLDEN, b'[{"file":"golden/0.png","probabilities":["x"]}]'
    ),
    "there are no golden pictures": lambda bundle, marker: replace_file(bundle, GOLDEN, b"[]"),
}


def as_published(bundle: Bundle) -> str:
    """The digest of the manifest on disk, as a registry that an attacker changed would have it."""
    try:
        return sha256_hex((bundle.folder / MANIFEST).read_bytes())
    except OSError:
        return "0" * 64
