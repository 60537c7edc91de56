"""The puller: follows the registry, verifies what it fetches, and lays it out for the workers.

Beside it a lookout tells the registry what happens here. Whatever happens there, what lies on disk
stays as it is and goes on serving.
"""

import contextlib
import errno
import fcntl
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Protocol

from registry.core.errors import BundleInvalid, ConvoyError, RegistryUnavailable
from registry.core.files import write_atomically
from registry.core.paths import Paths
from registry.delivery.deployment import (
    DeployedVersion,
    Deployment,
    all_deployments,
    read_deployment_or_none,
    version_folder,
    write_deployment,
    write_status,
)
from registry.delivery.signing import SIGNATURE, Signed, TrustedKeys, check_expiry
from registry.model.bundle import Bundle, fsync_tree, open_bundle
from registry.model.refs import CHALLENGER, CHAMPION, Canary, ModelRef, ModelVersion
from registry.store.mlflow_store import ModelStore

log = logging.getLogger(__name__)

# Beside what serves: a roll-back to one of them needs no download.
VERSIONS_KEPT = 5

# How often the file is looked at that says that somebody on this machine has decided something.
WAKE_S = 0.05
# A pull that brings less than this in such a time hangs; a byte a second keeps every time-out of
# MLflow's from ending it.
HANGS_S, HANGS_BYTES = 60.0, 65_536
# Beyond what a manifest says, or of a manifest: whoever sends more means no good.
SLACK_BYTES = 64 * 1024 * 1024
INCOMING = ".incoming-"

Traces = tuple[str, tuple[tuple[str, int, int], ...]]


class Monitor(Protocol):
    """What tells the registry how versions do on this machine."""

    def poll_once(self, store: ModelStore, name: str, canary: Canary | None) -> bool: ...

    def record_refusal(self, store: ModelStore, name: str, number: int, why: str) -> None: ...


class Puller:
    """Brings what ``refs`` mean in the registry to disk under ``models``."""

    def __init__(
        self,
        open_store: Callable[[], ModelStore],
        paths: Paths,
        refs: tuple[ModelRef, ...],
        monitor: Monitor | None = None,
    ) -> None:
        """Without a ``monitor`` nothing is written to the registry: reading it is enough."""
        self._open_store = open_store
        self._store: ModelStore | None = None
        self._paths = paths
        self._models = paths.models
        self._refs = refs
        self._monitor = monitor
        self._trust = TrustedKeys.from_environment()
        self._verified: dict[Path, Traces] = {}
        self._pulling_since: float | None = None
        # Of the download that is on its way.
        self._incoming: Path | None = None
        self._expected_bytes = 0

    def pull(self, ref: ModelRef) -> Deployment:
        """Resolve ``ref``, fetch its version if it is not here yet, and release it.

        Raises:
            VersionNotFound, RegistryUnavailable, BundleInvalid: as the store; nothing changed.
        """
        store = self._at_registry()
        aliases, canary = store.aliases_and_canary(ref.name)
        before = read_deployment_or_none(self._models, ref)
        versions: tuple[DeployedVersion, ...]
        wanted = store.resolve_in(aliases, ref)
        versions = (self._lay_out(store, wanted, ref.alias, before),)
        if ref.alias != CHAMPION or (canary and canary.version == versions[0].version):
            canary = None  # tried beside the champion, beside nothing else, and not beside itself
        if canary is not None:
            try:
                tried = store.resolve_in(aliases, ModelRef(ref.name, canary.version))
                versions = (*versions, self._lay_out(store, tried, CHALLENGER, before))
            except (ConvoyError, OSError) as error:  # the champion's matter it is not
                log.warning("%s is not tried: %s", canary, error)
                is_down = isinstance(error, RegistryUnavailable)
                if is_down and before is not None and before.canary == canary:
                    versions = (*versions, before.versions[1])
                else:
                    canary = None
        deployment = write_deployment(self._models, ref, versions, canary)
        if before is None or before.generation != deployment.generation:
            log.info(
                "released %s version %d%s (generation %d)",
                ref.name,
                versions[0].version,
                f", on trial {canary}" if canary else "",
                deployment.generation,
            )
            self._prune(ref.name)
        return deployment

    def check_serving(self, ref: ModelRef) -> None:
        """Ask the services how ``ref`` is served, and have the registry say what went wrong.

        Raises:
            RegistryUnavailable: it cannot be told now; the next look tries again.
        """
        deployment = read_deployment_or_none(self._models, ref)
        if self._monitor is None or deployment is None:
            return
        if self._monitor.poll_once(self._at_registry(), ref.name, deployment.canary):
            self.pull(ref)

    def _at_registry(self) -> ModelStore:
        if self._store is None:
            self._store = self._open_store()
        return self._store

    def _lay_out(
        self, store: ModelStore, version: ModelVersion, alias: str | None, before: Deployment | None
    ) -> DeployedVersion:
        """``version`` on disk, whole and verified, whatever that takes."""
        folder = version_folder(self._models, version.name, version.version)
        if self._trust:
            signed = self._verify_signature(version)
            # Its end counts when a version is chosen, not while it serves.
            if not before or version.manifest_sha256 not in _digests(before):
                check_expiry(signed, time.time())
        if not self._is_here(folder, version):
            try:
                self._fetch(store, folder, version)
            except BundleInvalid as error:
                if self._monitor is not None:
                    self._monitor.record_refusal(store, version.name, version.version, str(error))
                raise
        if self._trust and _read(folder / SIGNATURE) != version.signature:
            write_atomically(folder / SIGNATURE, (version.signature or "").encode())
        return DeployedVersion(
            version=version.version, manifest_sha256=version.manifest_sha256, alias=alias
        )

    def _verify_signature(self, version: ModelVersion) -> Signed:
        return self._trust.check(
            version.signature, version.name, version.version, version.manifest_sha256
        )

    def pull_all(self) -> bool:
        """Pull every ref; whether all went well. Failures are logged and noted on disk."""
        failures = 0
        for ref in self._refs:
            failure: str | None = None
            try:
                self._pulling_since = time.monotonic()
                self.pull(ref)
                self.check_serving(ref)
            except Exception as error:
                if not isinstance(error, ConvoyError | OSError):
                    log.error("cannot follow %s", ref, exc_info=error)
                failure, self._store = str(error), None
                failures += 1
                log.warning("cannot follow %s: %s", ref, failure)
            finally:
                self._pulling_since = None
            try:
                write_status(self._models, ref, failure)
            except OSError as error:  # a full or read-only disk: what serves is not touched
                log.warning("cannot note the state of %s: %s", ref, error)
        return failures == 0

    def guard(
        self, stop: Event, end: Callable[[], object] = lambda: os._exit(os.EX_TEMPFAIL)
    ) -> None:
        """End this process when a pull hangs or brings what was not said, until ``stop`` is set.

        Nothing less ends a thread that waits for a socket; whoever has started the puller starts it
        again. For a thread of its own.
        """
        progress, since = 0, time.monotonic()
        while not stop.wait(1.0):
            started, arrived = self._pulling_since, self._arrived_bytes()
            now = time.monotonic()
            progress = min(progress, arrived)
            if started is None or started > since or arrived - progress >= HANGS_BYTES:
                progress, since = arrived, now
            why = None
            if started is not None and now - since > HANGS_S:
                why = f"the registry has sent next to nothing for {HANGS_S:.0f} s"
            elif arrived > self._expected_bytes + SLACK_BYTES:
                why = f"the registry has sent {arrived:,} bytes of {self._expected_bytes:,}"
            if why is not None:
                log.error("%s; the puller ends, to begin anew", why)
                for ref in self._refs:
                    with contextlib.suppress(OSError):
                        write_status(self._models, ref, why)
                end()
                since = now

    def _arrived_bytes(self) -> int:
        """What has come of the download that is on its way."""
        incoming, total = self._incoming, 0
        with contextlib.suppress(OSError):  # it was renamed meanwhile
            for file in incoming.rglob("*") if incoming else ():
                total += file.stat().st_size if file.is_file() else 0
        return total

    def watch(self, stop: Event, interval_s: float) -> None:
        """Pull every ``interval_s`` seconds, jittered by ±20 %, until ``stop`` is set.

        At once when something is decided on this machine.
        """
        while not stop.is_set():
            decided = self._decided_ns()
            self.pull_all()
            pause_s = interval_s * random.uniform(0.8, 1.2)  # noqa: S311 - jitter, no secret
            again_at = time.monotonic() + pause_s
            while time.monotonic() < again_at and self._decided_ns() == decided:
                if stop.wait(min(WAKE_S, pause_s)):
                    break

    def _decided_ns(self) -> int:
        try:
            return self._paths.decided.stat().st_mtime_ns
        except OSError:
            return 0

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
        _remove_left(folder.parent)
        with (
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=INCOMING) as name,
            _locked(Path(name)),
        ):
            self._incoming, self._expected_bytes = Path(name), 0
            incoming = Path(name) / "bundle"
            try:
                store.download(version, incoming, self._room_for)
            finally:
                self._incoming = None
            fsync_tree(incoming)
            if folder.exists():
                folder.rename(Path(name) / "damaged")
            incoming.rename(folder)
        self._verified[folder] = _traces(folder, version)

    def _room_for(self, bundle: Bundle) -> list[str]:
        """The files to fetch, if the disk has room for them."""
        names = bundle.serving_files()
        self._expected_bytes = sum(bundle.manifest.files[name].size_bytes for name in names)
        free = shutil.disk_usage(self._models).free
        if free < self._expected_bytes + SLACK_BYTES:
            needed = f"{self._expected_bytes:,} bytes and {SLACK_BYTES:,} to spare"
            raise OSError(
                errno.ENOSPC, f"{needed} are needed, {free:,} are free", str(self._models)
            )
        return names

    def _prune(self, name: str) -> None:
        """Remove old versions, except those that serve: here or for other references."""
        deployments = all_deployments(self._models, name)
        serving = {each.version for deployment in deployments for each in deployment.versions}
        folders = [
            p
            for p in version_folder(self._models, name, 0).parent.iterdir()
            if p.name.isdigit() and int(p.name) not in serving
        ]
        newest_first = sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)
        for folder in newest_first[VERSIONS_KEPT:]:
            log.info("removing %s: not served, and %d newer ones are kept", folder, VERSIONS_KEPT)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Show other pullers of these models that this folder is in use; ``OSError`` if it is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_left(versions: Path) -> None:
    """Remove what pullers that were killed have left."""
    for left in versions.glob(f"{INCOMING}*"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)


def _digests(deployment: Deployment) -> set[str]:
    return {each.manifest_sha256 for each in deployment.versions}


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return None


def _traces(folder: Path, version: ModelVersion) -> Traces:
    """What changes when a file in ``folder`` does, or when another version is meant."""
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return version.manifest_sha256, tuple(
        (str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files
    )
