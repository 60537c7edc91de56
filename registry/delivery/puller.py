"""The puller: follows the registry, and puts verified versions on disk for the workers.

A monitor reports to the registry how the versions do on this machine. If the registry fails, the
versions on disk stay as they are, and the workers go on serving them.
"""

import contextlib
import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Protocol

from registry.core.errors import BundleInvalid, ConvoyError, RegistryUnavailable
from registry.core.files import write_atomically
from registry.core.paths import Paths
from registry.delivery.deployment import (
    DeployedVersion,
    Deployment,
    read_deployment_or_none,
    version_folder,
    write_deployment,
    write_status,
)
from registry.delivery.downloads import Downloads
from registry.delivery.signing import SIGNATURE, Signed, TrustedKeys, check_expiry
from registry.model.refs import CHALLENGER, CHAMPION, Canary, ModelRef, ModelVersion
from registry.store.mlflow_store import ModelStore

log = logging.getLogger(__name__)

# How often ``watch`` checks the file that a decision on this machine touches.
DECISION_POLL_INTERVAL_S = 0.05
# A pull that receives fewer bytes than this within the time-out has stalled. MLflow's own time-outs
# do not end it: a byte a second resets them.
STALL_TIMEOUT_S, MIN_PROGRESS_BYTES = 60.0, 65_536


class Monitor(Protocol):
    """Reports to the registry how versions do on this machine (``CanaryMonitor``)."""

    def poll_once(self, store: ModelStore, name: str, canary: Canary | None) -> bool:
        """Record versions that workers refuse, and check ``canary``; True if this call ended it.

        Raises:
            RegistryUnavailable: the registry cannot be written to now; the next poll tries again.
        """

    def record_refusal(self, store: ModelStore, name: str, number: int, why: str) -> None:
        """Record, once, that this machine cannot serve version ``number`` of ``name``, and ``why``.

        Raises:
            RegistryUnavailable: the registry cannot be written to now; the next call tries again.
        """


class Puller:
    """Keeps the versions that ``refs`` name in the registry on disk, under ``paths.models``."""

    def __init__(
        self,
        open_store: Callable[[], ModelStore],
        paths: Paths,
        refs: tuple[ModelRef, ...],
        monitor: Monitor | None = None,
    ) -> None:
        """Without a ``monitor`` the puller needs only read access to the registry."""
        self._open_store = open_store
        self._store: ModelStore | None = None
        self._paths = paths
        self._models = paths.models
        self._downloads = Downloads(paths.models)
        self._refs = refs
        self._monitor = monitor
        self._trust = TrustedKeys.from_environment()
        self._pulling_since: float | None = None

    def pull(self, ref: ModelRef) -> Deployment:
        """Resolve ``ref``, download its version if it is not on disk yet, and deploy it.

        Raises:
            VersionNotFound: the registry has no such version; nothing has changed on disk.
            RegistryUnavailable: the registry does not answer; nothing has changed on disk.
            BundleInvalid: the version is damaged or not signed; the deployment has not changed.
        """
        store = self._opened_store()
        aliases, canary = store.aliases.read_with_canary(ref.name)
        before = read_deployment_or_none(self._models, ref)
        versions: tuple[DeployedVersion, ...]
        wanted = store.resolve_in(aliases, ref)
        versions = (self._lay_out(store, wanted, ref.alias, before),)
        if ref.alias != CHAMPION or (canary and canary.version == versions[0].version):
            canary = None  # only a champion has a canary, and never itself
        if canary is not None:
            try:
                challenger = store.resolve_in(aliases, ModelRef(ref.name, canary.version))
                versions = (*versions, self._lay_out(store, challenger, CHALLENGER, before))
            except (ConvoyError, OSError) as error:  # must not keep the champion from serving
                log.warning("cannot deploy the canary, %s: %s", canary, error)
                is_down = isinstance(error, RegistryUnavailable)
                if is_down and before is not None and before.canary == canary:
                    versions = (*versions, before.versions[1])
                else:
                    canary = None
        deployment = write_deployment(self._models, ref, versions, canary)
        if before is None or before.generation != deployment.generation:
            log.info(
                "deployed %s version %d%s (generation %d)",
                ref.name,
                versions[0].version,
                f", canary: {canary}" if canary else "",
                deployment.generation,
            )
            self._downloads.remove_old(ref.name)
        return deployment

    def check_serving(self, ref: ModelRef) -> None:
        """Have the monitor check how the services serve ``ref``; pull again if it ends a canary.

        Raises:
            RegistryUnavailable: the registry cannot be written to now; the next poll tries again.
        """
        deployment = read_deployment_or_none(self._models, ref)
        if self._monitor is None or deployment is None:
            return
        if self._monitor.poll_once(self._opened_store(), ref.name, deployment.canary):
            self.pull(ref)

    def _opened_store(self) -> ModelStore:
        if self._store is None:
            self._store = self._open_store()
        return self._store

    def _lay_out(
        self, store: ModelStore, version: ModelVersion, alias: str | None, before: Deployment | None
    ) -> DeployedVersion:
        """Put ``version`` on disk, complete and verified, unless it is there already."""
        folder = version_folder(self._models, version.name, version.version)
        if self._trust:
            signed = self._verify_signature(version)
            # A signature must be in force when a version is chosen, not while it serves.
            if not before or version.manifest_sha256 not in _digests(before):
                check_expiry(signed, time.time())
        if not self._downloads.has(folder, version):
            try:
                self._downloads.fetch(store, folder, version)
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
        """Pull every ref; whether all succeeded. Logs failures, writes each status to disk."""
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
            except OSError as error:  # a full or read-only disk does not affect serving
                log.warning("cannot write the status of %s: %s", ref, error)
        return failures == 0

    def end_if_stalled(
        self, stop: Event, end: Callable[[], object] = lambda: os._exit(os.EX_TEMPFAIL)
    ) -> None:
        """End this process if a pull stalls or exceeds its manifest, until ``stop`` is set.

        Only the end of the process ends a thread that waits for a socket. The supervisor that
        started the puller starts it again. Run this in a thread of its own.
        """
        progress, since = 0, time.monotonic()
        while not stop.wait(1.0):
            started, arrived = self._pulling_since, self._downloads.arrived_bytes
            now = time.monotonic()
            progress = min(progress, arrived)
            if started is None or started > since or arrived - progress >= MIN_PROGRESS_BYTES:
                progress, since = arrived, now
            why = None
            if started is not None and now - since > STALL_TIMEOUT_S:
                why = f"the registry has sent next to nothing for {STALL_TIMEOUT_S:.0f} s"
            elif arrived > self._downloads.max_bytes:
                why = (
                    f"the registry has sent {arrived:,} bytes, the manifest announced "
                    f"{self._downloads.expected_bytes:,}"
                )
            if why is not None:
                log.error("%s; the puller ends, for its supervisor to restart it", why)
                for ref in self._refs:
                    with contextlib.suppress(OSError):
                        write_status(self._models, ref, why)
                end()
                since = now

    def watch(self, stop: Event, interval_s: float) -> None:
        """Pull every ``interval_s`` seconds, jittered by ±20 %, until ``stop`` is set.

        A decision that is made on this machine causes a pull at once.
        """
        while not stop.is_set():
            decided = self._decided_ns()
            self.pull_all()
            pause_s = interval_s * random.uniform(0.8, 1.2)  # noqa: S311 - jitter, no secret
            again_at = time.monotonic() + pause_s
            while time.monotonic() < again_at and self._decided_ns() == decided:
                if stop.wait(min(DECISION_POLL_INTERVAL_S, pause_s)):
                    break

    def _decided_ns(self) -> int:
        try:
            return self._paths.decided.stat().st_mtime_ns
        except OSError:
            return 0


def _digests(deployment: Deployment) -> set[str]:
    return {each.manifest_sha256 for each in deployment.versions}


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return None
