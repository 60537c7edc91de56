"""``deployment@ALIAS.json``, ``deployment-NUMBER.json``: which versions of a model serve here.

The puller writes these files and the workers read them; there is no other channel between the two.
Each reference that the puller follows has its own file, so a service of the champion and one of a
fixed version can share a home folder. A file is replaced atomically: a reader sees the old
deployment or the new one. ``pull@ALIAS.json`` separately says whether the puller could reach the
registry lately, so a deployment changes only when other versions are to be served.
"""

import hashlib
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from registry.core.errors import BundleInvalid
from registry.core.files import locked
from registry.core.names import Sha256, shortened
from registry.model.refs import Canary, ModelRef

DEPLOYMENT_SCHEMA_VERSION = 2
# Probes, pages and the registry show the errors of pullers and workers, cut to this length.
MAX_ERROR_CHARS = 2_000


class DeployedVersion(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One version to serve, and the alias that points at it, if any."""

    version: Annotated[int, Meta(ge=1)]
    manifest_sha256: Sha256
    alias: str | None = None


class Deployment(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the workers serve: one version, or during a ``canary`` two, the challenger second.

    ``generation`` grows by one with every change, so the order does not depend on clocks.
    """

    schema_version: int
    model: str
    generation: int
    versions: Annotated[tuple[DeployedVersion, ...], Meta(min_length=1, max_length=2)]
    canary: Canary | None = None

    def __post_init__(self) -> None:
        expected = [self.canary.version] if self.canary else []
        if [each.version for each in self.versions[1:]] != expected:
            raise ValueError("a second version must be the canary, and a canary must be the second")

    @property
    def key(self) -> int:
        """A number that identifies this deployment, even if two have the same generation."""
        return int.from_bytes(hashlib.sha256(msgspec.json.encode(self)).digest()[:7]) + 1

    @property
    def challenger(self) -> DeployedVersion | None:
        """The version that is the canary; None if there is none."""
        return self.versions[1] if self.canary else None

    def find(self, ref: ModelRef) -> DeployedVersion | None:
        """The version that ``ref`` names by alias or number; None if it is not deployed."""
        for deployed in self.versions:
            if ref.alias is not None and deployed.alias == ref.alias:
                return deployed
            if ref.version is not None and deployed.version == ref.version:
                return deployed
        return None


class PullStatus(Struct, frozen=True, kw_only=True):
    """When the puller last agreed with the registry, and the error since then.

    ``agreed_unix_s`` is for people to read. ``age_s`` uses ``agreed_boot_s``, seconds since the
    start ``boot`` of this machine, because no operator or time server sets that clock.
    """

    agreed_unix_s: float | None
    agreed_boot_s: float | None = None
    boot: str = ""
    error: str | None = None

    @property
    def age_s(self) -> float | None:
        """Seconds since the puller last agreed with the registry; None if it never did."""
        if self.agreed_unix_s is None:
            return None
        if self.agreed_boot_s is not None and self.boot == boot_id():
            return max(0.0, boot_s() - self.agreed_boot_s)
        return max(0.0, time.time() - self.agreed_unix_s)  # the machine has restarted since


def version_folder(models: Path, name: str, version: int) -> Path:
    """The folder of one version's bundle. It exists only once the bundle is verified."""
    return models / name / "versions" / str(version)


def deployment_file(models: Path, ref: ModelRef) -> Path:
    """The file that says which versions serve for ``ref``."""
    return _file(models, ref, "deployment")


def all_deployments(models: Path, name: str) -> list[Deployment]:
    """All deployments of the model ``name``; unreadable files are left out."""
    found = []
    for file in sorted((models / name).glob("deployment[@-]*.json")):
        with suppress(BundleInvalid, FileNotFoundError):
            found.append(_decode(file, name))
    return found


def read_deployment(models: Path, ref: ModelRef) -> Deployment | None:
    """The deployment for ``ref``; None if there is none yet.

    Raises:
        BundleInvalid: the file exists but cannot be read.
    """
    try:
        return _decode(deployment_file(models, ref), ref.name)
    except FileNotFoundError:
        return None


def _file(models: Path, ref: ModelRef, kind: str) -> Path:
    selector = f"-{ref.version}" if ref.alias is None else f"@{ref.alias}"
    return models / ref.name / f"{kind}{selector}.json"


def _decode(path: Path, name: str) -> Deployment:
    data = path.read_bytes()
    try:
        deployment = msgspec.json.decode(data, type=Deployment)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BundleInvalid(f"{path} cannot be read: {error}") from error
    if deployment.schema_version != DEPLOYMENT_SCHEMA_VERSION or deployment.model != name:
        raise BundleInvalid(
            f"{path} is for model {deployment.model}, schema {deployment.schema_version}; "
            f"expected {name}, schema {DEPLOYMENT_SCHEMA_VERSION}"
        )
    return deployment


def read_deployment_or_none(models: Path, ref: ModelRef) -> Deployment | None:
    """The deployment for ``ref``; None if there is none or it cannot be read."""
    try:
        return read_deployment(models, ref)
    except BundleInvalid:
        return None


def write_deployment(
    models: Path,
    ref: ModelRef,
    versions: tuple[DeployedVersion, ...],
    canary: Canary | None = None,
) -> Deployment:
    """Deploy ``versions`` for ``ref``; if nothing changes, the generation stays the same."""
    with locked(deployment_file(models, ref)) as file:
        current = read_deployment_or_none(models, ref)
        if current is not None and (current.versions, current.canary) == (versions, canary):
            return current
        deployment = Deployment(
            schema_version=DEPLOYMENT_SCHEMA_VERSION,
            model=ref.name,
            generation=current.generation + 1 if current else 1,
            versions=versions,
            canary=canary,
        )
        file.replace(msgspec.json.encode(deployment) + b"\n")
    return deployment


def read_status(models: Path, ref: ModelRef) -> PullStatus:
    """The puller's last status of ``ref``; its times are None if no puller ever wrote one."""
    try:
        return msgspec.json.decode(_file(models, ref, "pull").read_bytes(), type=PullStatus)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return PullStatus(agreed_unix_s=None)


def write_status(models: Path, ref: ModelRef, error: str | None) -> None:
    """Record that the puller agreed with the registry (``error`` None), or why it could not."""
    with locked(_file(models, ref, "pull")) as file:
        if error is None:
            status = PullStatus(agreed_unix_s=time.time(), agreed_boot_s=boot_s(), boot=boot_id())
        else:
            status = replace(read_status(models, ref), error=shortened(error, MAX_ERROR_CHARS))
        file.replace(msgspec.json.encode(status) + b"\n")


def boot_s() -> float:
    """Seconds since this machine started, including time asleep."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@cache
def boot_id() -> str:
    """An identifier of this start of the machine; empty if the kernel gives none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
