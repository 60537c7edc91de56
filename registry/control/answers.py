"""The answers of the control plane's API that no other module defines."""

from typing import Literal

from msgspec import Struct

from registry.model.manifest import Manifest
from registry.model.refs import Canary, ModelVersion
from registry.store.audit_log import Line


class ModelStatus(Struct, frozen=True):
    """One model: which version each alias names, and the canary."""

    name: str
    aliases: dict[str, int]
    canary: Canary | None


class ModelStatuses(Struct, frozen=True):
    """All models."""

    models: list[ModelStatus]


class TaggedVersion(ModelVersion, frozen=True, kw_only=True):
    """A version with the registry's tags, its metrics among them."""

    tags: dict[str, str]


class Versions(Struct, frozen=True):
    """The versions of a model, newest first."""

    versions: list[TaggedVersion]


class Version(Struct, frozen=True):
    """One version and its manifest."""

    version: ModelVersion
    manifest: Manifest


class GatePending(Struct, frozen=True):
    """The gate is running; ask again."""

    state: Literal["running"] = "running"


class History(Struct, frozen=True):
    """Lines of the audit log, oldest first."""

    lines: list[Line]


class Audit(Struct, frozen=True):
    """How many lines the audit log has, and the faults of the log and of the aliases."""

    lines: int
    faults: list[str]
