"""``release.json``: which versions of a model serve on this machine.

The puller writes it, the workers read it; it is the only channel between them. It is replaced
atomically, so a reader sees the old release or the new one and nothing between. Whether the
registry could be reached lately is kept apart in ``pull.json``, so that a release changes only when
what is served changes.
"""

import hashlib
import os
import time
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from registry.contract import ModelRef, Sha256, Trial
from registry.errors import BundleInvalid

RELEASE_SCHEMA_VERSION = 2


class ReleasedVersion(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One version that serves, and the alias that chose it."""

    version: Annotated[int, Meta(ge=1)]
    manifest_sha256: Sha256
    alias: str | None = None


class Release(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What serves: one version, or with a ``trial`` two, the challenger being the second.

    ``generation`` grows by one with every change; clocks decide nothing.
    """

    schema_version: int
    model: str
    generation: int
    versions: Annotated[tuple[ReleasedVersion, ...], Meta(min_length=1, max_length=2)]
    trial: Trial | None = None

    def __post_init__(self) -> None:
        tried = [self.trial.version] if self.trial else []
        if [each.version for each in self.versions[1:]] != tried:
            raise ValueError("a second version is there if, and only if, it is on trial")

    @property
    def key(self) -> int:
        """Names this release among all, also those of a generation that was counted twice."""
        return int.from_bytes(hashlib.sha256(msgspec.json.encode(self)).digest()[:7]) + 1

    @property
    def challenger(self) -> ReleasedVersion | None:
        """The version that is on trial."""
        return self.versions[1] if self.trial else None

    def find(self, ref: ModelRef) -> ReleasedVersion | None:
        """The version that ``ref`` means, by its alias or its number; None when it is not here."""
        for released in self.versions:
            if ref.alias is not None and released.alias == ref.alias:
                return released
            if ref.version is not None and released.version == ref.version:
                return released
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


def model_folder(models: Path, name: str) -> Path:
    return models / name


def version_folder(models: Path, name: str, version: int) -> Path:
    """Where the bundle of one version lies once it is whole and verified."""
    return models / name / "versions" / str(version)


def release_file(models: Path, name: str) -> Path:
    return models / name / "release.json"


def read_release(models: Path, name: str) -> Release | None:
    """The release of model ``name``; None when nothing was released yet.

    Raises:
        BundleInvalid: the file is there but cannot be understood.
    """
    path = release_file(models, name)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        release = msgspec.json.decode(data, type=Release)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BundleInvalid(f"{path} cannot be read: {error}") from error
    if release.schema_version != RELEASE_SCHEMA_VERSION or release.model != name:
        raise BundleInvalid(
            f"{path} is of model {release.model}, schema {release.schema_version}; "
            f"expected {name}, schema {RELEASE_SCHEMA_VERSION}"
        )
    return release


def read_release_or_none(models: Path, name: str) -> Release | None:
    """The release of model ``name``; None where there is none that can be understood."""
    try:
        return read_release(models, name)
    except BundleInvalid:
        return None


def write_release(
    models: Path,
    name: str,
    versions: tuple[ReleasedVersion, ...],
    trial: Trial | None = None,
) -> Release:
    """Make ``versions`` the release of ``name``; one that changes nothing keeps its generation."""
    current = read_release_or_none(models, name)
    if current is not None and (current.versions, current.trial) == (versions, trial):
        return current
    release = Release(
        schema_version=RELEASE_SCHEMA_VERSION,
        model=name,
        generation=current.generation + 1 if current else 1,
        versions=versions,
        trial=trial,
    )
    write_atomically(release_file(models, name), msgspec.json.encode(release) + b"\n")
    return release


def read_status(models: Path, name: str) -> PullStatus:
    """The puller's last word about ``name``; all None where no puller ever ran."""
    try:
        data = (model_folder(models, name) / "pull.json").read_bytes()
        return msgspec.json.decode(data, type=PullStatus)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return PullStatus(agreed_unix_s=None)


def write_status(models: Path, name: str, error: str | None) -> None:
    """Note that the registry was reached (``error`` None), or why not."""
    if error is None:
        status = PullStatus(agreed_unix_s=time.time(), agreed_boot_s=boot_s(), boot=boot_id())
    else:
        status = replace(read_status(models, name), error=error)
    write_atomically(model_folder(models, name) / "pull.json", msgspec.json.encode(status) + b"\n")


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


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` so that a reader, or a crash, finds the old or the new whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)
