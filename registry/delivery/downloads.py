"""``Downloads``: the versions that a puller keeps on disk, and the download that is under way."""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from registry.core.errors import BundleInvalid
from registry.delivery.deployment import all_deployments, version_folder
from registry.model.bundle import Bundle, fsync_tree, open_bundle
from registry.model.refs import ModelVersion
from registry.store.mlflow_store import ModelStore

log = logging.getLogger(__name__)

# In addition to the versions that serve: a roll-back to one of them needs no download.
VERSIONS_KEPT = 5
# A download may exceed the sizes in its manifest by this much, and the manifest may have this size.
# A registry that sends more is faulty or hostile.
MAX_EXTRA_BYTES = 64 * 1024 * 1024
INCOMING = ".incoming-"

Fingerprint = tuple[str, tuple[tuple[str, int, int], ...]]


class Downloads:
    """The versions under the folder ``models``, each complete and verified."""

    def __init__(self, models: Path) -> None:
        self._models = models
        self._verified: dict[Path, Fingerprint] = {}
        self._incoming: Path | None = None
        self.expected_bytes = 0
        """The bytes that the manifest of the present download announces."""

    @property
    def arrived_bytes(self) -> int:
        """The size of the present download so far."""
        incoming, total = self._incoming, 0
        with contextlib.suppress(OSError):  # another thread renamed the folder meanwhile
            for file in incoming.rglob("*") if incoming else ():
                total += file.stat().st_size if file.is_file() else 0
        return total

    @property
    def max_bytes(self) -> int:
        """The size that the present download may have."""
        return self.expected_bytes + MAX_EXTRA_BYTES

    def has(self, folder: Path, version: ModelVersion) -> bool:
        """Whether ``folder`` has a complete copy; it is verified again if a file has changed."""
        if folder in self._verified and self._verified[folder] == _fingerprint(folder, version):
            return True
        if not folder.is_dir():
            return False
        try:
            bundle = open_bundle(folder, version.manifest_sha256)
            bundle.verify(bundle.serving_files())
        except BundleInvalid as error:
            log.warning("%s; downloading it again", error)
            return False
        self._verified[folder] = _fingerprint(folder, version)
        return True

    def fetch(self, store: ModelStore, folder: Path, version: ModelVersion) -> None:
        """Download into a temporary folder, verify, flush, rename: never half a bundle in place."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        with (
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=INCOMING) as name,
            _locked(Path(name)),
        ):
            self._incoming, self.expected_bytes = Path(name), 0
            incoming = Path(name) / "bundle"
            try:
                store.download(version, incoming, self._files_to_fetch)
            finally:
                self._incoming = None
            fsync_tree(incoming)
            if folder.exists():
                folder.rename(Path(name) / "damaged")
            incoming.rename(folder)
        self._verified[folder] = _fingerprint(folder, version)

    def _files_to_fetch(self, bundle: Bundle) -> list[str]:
        """The files to download; raises ``OSError`` if the disk has too little room for them."""
        names = bundle.serving_files()
        self.expected_bytes = sum(bundle.manifest.files[name].size_bytes for name in names)
        free = shutil.disk_usage(self._models).free
        if free < self.max_bytes:
            needed = f"{self.expected_bytes:,} bytes and {MAX_EXTRA_BYTES:,} in reserve"
            raise OSError(
                errno.ENOSPC, f"{needed} are needed, {free:,} are free", str(self._models)
            )
        return names

    def remove_old(self, name: str) -> None:
        """Remove old versions, except those that serve for any reference."""
        deployments = all_deployments(self._models, name)
        serving = {each.version for deployment in deployments for each in deployment.versions}
        folders = [
            p
            for p in version_folder(self._models, name, 0).parent.iterdir()
            if p.name.isdigit() and int(p.name) not in serving
        ]
        newest_first = sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)
        for folder in newest_first[VERSIONS_KEPT:]:
            log.info(
                "removing %s: it does not serve, and %d newer ones are kept", folder, VERSIONS_KEPT
            )
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Mark ``folder`` as in use for other pullers; ``OSError`` if another one uses it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(versions: Path) -> None:
    """Remove the incomplete downloads of pullers that were killed."""
    for folder in versions.glob(f"{INCOMING}*"):
        with contextlib.suppress(OSError), _locked(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _fingerprint(folder: Path, version: ModelVersion) -> Fingerprint:
    """A value that changes when a file in ``folder`` or the version's digest changes."""
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return version.manifest_sha256, tuple(
        (str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files
    )
