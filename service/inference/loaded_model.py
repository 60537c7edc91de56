"""Loaded versions: ``ServedModel`` is one, ``ActiveVersions`` those of a deployment."""

from collections.abc import Mapping
from typing import Protocol, TypeVar

from msgspec import Struct

from registry.core.errors import ModelNotFound
from registry.delivery.deployment import Deployment
from registry.model.classifier import Classifier
from registry.model.manifest import Manifest
from registry.model.refs import Canary
from service.inference.batcher import MicroBatcher


class ServedModel(Struct, frozen=True, kw_only=True):
    """One version: loaded, warmed up and checked on its golden images.

    Immutable, and shared by all threads.
    """

    manifest: Manifest
    manifest_sha256: str
    version: int
    alias: str | None
    classifier: Classifier
    batcher: MicroBatcher

    @property
    def name(self) -> str:
        """The model's name in the registry, from the manifest."""
        return self.manifest.model

    @property
    def device(self) -> str:
        """A description of the device, for people."""
        return self.classifier.device

    @property
    def plan(self) -> str:
        """The plan's name, such as ``onnxruntime-fp32``."""
        return self.classifier.plan


class ActiveVersions(Struct, frozen=True):
    """A loaded deployment. ``challenger`` is the canary or shadow.

    While it is None, the champion also answers the challenger's share.
    """

    key: int
    deployment: Deployment
    champion: ServedModel
    challenger: ServedModel | None = None

    @property
    def canary(self) -> Canary | None:
        """The deployment's canary; None if the challenger is not loaded or its device is lost."""
        has_challenger = self.challenger is not None and not self.challenger.classifier.lost
        return self.deployment.canary if has_challenger else None

    @property
    def whole(self) -> bool:
        """Whether every version of the deployment is loaded."""
        return (self.challenger is None) == (self.deployment.canary is None)

    def find(self, version: int | None, alias: str | None) -> ServedModel | None:
        """The served version with that number or alias, or None; the champion if both are None."""
        for served in (self.champion, self.challenger):
            if served and version in (None, served.version) and alias in (None, served.alias):
                return served
        return None


class Slot(Protocol):
    """One model of this service, whichever version of it is loaded."""

    @property
    def serving(self) -> ActiveVersions | None:
        """The versions that serve; None while nothing is loaded."""

    def require(self) -> ActiveVersions:
        """The versions that serve; raises ``ModelNotReady`` while there are none."""


AnySlot = TypeVar("AnySlot", bound=Slot)


def find_slot(slots: Mapping[str, AnySlot], name: str | None = None) -> AnySlot:
    """The slot of the model ``name``; without a name the first one, which is the default model.

    Raises:
        ModelNotFound: no model has that name.
    """
    if name is None:
        return next(iter(slots.values()))
    if name not in slots:
        raise ModelNotFound(f"there is no model {name[:80]!r} here; there are: {', '.join(slots)}")
    return slots[name]
