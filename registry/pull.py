"""The puller: follows the registry, verifies what it fetches, and lays it out for the workers.

It is the only part that talks to the registry at run time. Whatever happens there, what lies on
disk stays as it is and goes on serving.
"""

import logging
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Event

from registry.bundle import fsync_tree, open_bundle
from registry.contract import ModelRef, ModelVersion
from registry.errors import BundleInvalid, ConvoyError
from registry.releases import (
    Release,
    ReleasedVersion,
    read_release_or_none,
    version_folder,
    write_release,
    write_status,
)
from registry.store import ModelStore

log = logging.getLogger(__name__)

# Beside what serves: a roll-back to one of them needs no download.
VERSIONS_KEPT = 5

Traces = tuple[str, tuple[tuple[str, int, int], ...]]


class Puller:
    """Brings what ``refs`` mean in the registry to disk under ``models``."""

    def __init__(
        self, open_store: Callable[[], ModelStore], models: Path, refs: tuple[ModelRef, ...]
    ) -> None:
        self._open_store = open_store
        self._store: ModelStore | None = None
        self._models = models
        self._refs = refs
        self._verified: dict[Path, Traces] = {}

    def pull(self, ref: ModelRef) -> Release:
        """Resolve ``ref``, fetch its version if it is not here yet, and release it.

        Raises:
            VersionNotFound, RegistryUnavailable, BundleInvalid: as the store; nothing changed.
        """
        if self._store is None:
            self._store = self._open_store()
        version = self._store.resolve(ref)
        folder = version_folder(self._models, version.name, version.version)
        if not self._is_here(folder, version):
            self._fetch(self._store, folder, version)
        before = read_release_or_none(self._models, ref.name)
        released = ReleasedVersion(
            version=version.version, manifest_sha256=version.manifest_sha256, alias=ref.alias
        )
        release = write_release(self._models, ref.name, (released,))
        if before is None or before.generation != release.generation:
            log.info(
                "released %s version %d (generation %d)",
                ref.name,
                version.version,
                release.generation,
            )
            self._prune(ref.name, version.version)
        return release

    def pull_all(self) -> bool:
        """Pull every ref; whether all went well. Failures are logged and noted in ``pull.json``."""
        failures = 0
        for ref in self._refs:
            failure: str | None = None
            try:
                self.pull(ref)
            except (ConvoyError, OSError) as error:
                failure, self._store = str(error), None
                failures += 1
                log.warning("cannot follow %s: %s", ref, failure)
            try:
                write_status(self._models, ref.name, failure)
            except OSError as error:  # a full or read-only disk: what serves is not touched
                log.warning("cannot note the state of %s: %s", ref, error)
        return failures == 0

    def watch(self, stop: Event, interval_s: float) -> None:
        """Pull every ``interval_s`` seconds, jittered by ±20 %, until ``stop`` is set."""
        while not stop.is_set():
            self.pull_all()
            stop.wait(interval_s * random.uniform(0.8, 1.2))  # noqa: S311 - jitter, no secret

    def _is_here(self, folder: Path, version: ModelVersion) -> bool:
        """Whether a whole copy lies in ``folder``; it is read again when a file was touched."""
        if folder in self._verified and self._verified[folder] == _traces(folder, version):
            return True
        if not folder.is_dir():
            return False
        try:
            bundle = open_bundle(folder, version.manifest_sha256)
            bundle.verify(bundle.serving_files())
        except BundleInvalid as error:
            log.warning("%s; fetching it again", error)
            return False
        self._verified[folder] = _traces(folder, version)
        return True

    def _fetch(self, store: ModelStore, folder: Path, version: ModelVersion) -> None:
        """Fetch into a temporary folder, verify, flush, rename: never half a bundle in place."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".incoming-") as name:
            incoming = Path(name) / "bundle"
            store.download(version, incoming, lambda bundle: bundle.serving_files())
            fsync_tree(incoming)
            if folder.exists():
                folder.rename(Path(name) / "damaged")
            incoming.rename(folder)
        self._verified[folder] = _traces(folder, version)

    def _prune(self, name: str, serving: int) -> None:
        folders = [
            p
            for p in version_folder(self._models, name, serving).parent.iterdir()
            if p.name.isdigit() and int(p.name) != serving
        ]
        newest_first = sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)
        for folder in newest_first[VERSIONS_KEPT:]:
            log.info("removing %s: not served, and %d newer ones are kept", folder, VERSIONS_KEPT)
            shutil.rmtree(folder, ignore_errors=True)


def _traces(folder: Path, version: ModelVersion) -> Traces:
    """What changes when a file in ``folder`` does, or when another version is meant."""
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return version.manifest_sha256, tuple(
        (str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files
    )
