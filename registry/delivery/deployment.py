"""``deployment@ALIAS.json``, ``deployment-NUMBER.json``: which versions of a model serve here.

The puller writes them, the workers read them; they are the only channel between them. Each
reference that is followed has a file of its own, so that a service of the champion and one of a
pinned number can share a home. A file is replaced atomically: a reader sees the old release or the
new one. Whether the registry could be reached lately is kept apart in ``pull@ALIAS.json``, so that
a release changes only when what is served changes.
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
# What a puller or a worker says went wrong: it goes to probes, to pages and to the registry.
MAX_ERROR_CHARS = 2_000


class DeployedVersion(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One version that serves, and the alias that chose it."""

    version: Annotated[int, Meta(ge=1)]
    manifest_sha256: Sha256
    alias: str | None = None


class Deployment(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What serves: one version, or with a ``canary`` two, the challenger being the second.

    ``generation`` grows by one with every change; clocks decide nothing.
    """

    schema_version: int
    model: str
    generation: int
    versions: Annotated[tuple[DeployedVersion, ...], Meta(min_length=1, max_length=2)]
    canary: Canary | None = None

    def __post_init__(self) -> None:
        tried = [self.canary.version] if self.canary else []
        if [each.version for each in self.versions[1:]] != tried:
            raise ValueError("a second version is there if, and only if, it is on trial")

    @property
    def key(self) -> int:
        """Names this release among all, also those of a generation that was counted twice."""
        return int.from_bytes(hashlib.sha256(msgspec.json.encode(self)).digest()[:7]) + 1

    @property
    def challenger(self) -> DeployedVersion | None:
        """The version that is on trial."""
        return self.versions[1] if self.canary else None

    def find(self, ref: ModelRef) -> DeployedVersion | None:
        """The version that ``ref`` means, by its alias or its number; None when it is not here."""
        for deployed in self.versions:
            if ref.alias is not None and deployed.alias == ref.alias:
                return deployed
            if ref.version is not None and deployed.version == ref.version:
                return deployed
        return None


class PullStatus(Struct, frozen=True, kw_only=True):
    """The puller's last word: when it last agreed with the registry, and what is wrong since.

    ``agreed_unix_s`` is for people. How long ago it was is told by the clock that counts since
    this machine's start, ``boot``, which nobody sets.
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
        return max(0.0, time.time() - self.agreed_unix_s)  # the machine was started since


def version_folder(models: Path, name: str, version: int) -> Path:
    """Where the bundle of one version lies once it is whole and verified."""
    return models / name / "versions" / str(version)


def deployment_file(models: Path, ref: ModelRef) -> Path:
    return _file(models, ref, "deployment")


def all_deployments(models: Path, name: str) -> list[Deployment]:
    """What serves of the model ``name``, by whichever reference; unreadable files are left out."""
    found = []
    for file in sorted((models / name).glob("deployment[@-]*.json")):
        with suppress(BundleInvalid, FileNotFoundError):
            found.append(_decode(file, name))
    return found


def read_deployment(models: Path, ref: ModelRef) -> Deployment | None:
    """What serves for ``ref``; None when nothing was released yet.

    Raises:
        BundleInvalid: the file is there but cannot be understood.
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
            f"{path} is of model {deployment.model}, schema {deployment.schema_version}; "
            f"expected {name}, schema {DEPLOYMENT_SCHEMA_VERSION}"
        )
    return deployment


def read_deployment_or_none(models: Path, ref: ModelRef) -> Deployment | None:
    """What serves for ``ref``; None where there is no release that can be understood."""
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
    """Make ``versions`` the release of ``ref``; one that changes nothing keeps its generation."""
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
    """The puller's last word about ``ref``; all None where no puller ever ran."""
    try:
        return msgspec.json.decode(_file(models, ref, "pull").read_bytes(), type=PullStatus)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return PullStatus(agreed_unix_s=None)


def write_status(models: Path, ref: ModelRef, error: str | None) -> None:
    """Note that the registry was reached (``error`` None), or why not."""
    with locked(_file(models, ref, "pull")) as file:
        if error is None:
            status = PullStatus(agreed_unix_s=time.time(), agreed_boot_s=boot_s(), boot=boot_id())
        else:
            status = replace(read_status(models, ref), error=shortened(error, MAX_ERROR_CHARS))
        file.replace(msgspec.json.encode(status) + b"\n")


def boot_s() -> float:
    """Seconds since this machine's start, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@cache
def boot_id() -> str:
    """What tells this start of the machine from others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
