"""What serves: a version that is loaded, and a release of one or two of them."""

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
    """One version, loaded, warmed up and proved. Immutable, shared by all threads."""

    manifest: Manifest
    manifest_sha256: str
    version: int
    alias: str | None
    classifier: Classifier
    batcher: MicroBatcher

    @property
    def name(self) -> str:
        return self.manifest.model

    @property
    def device(self) -> str:
        return self.classifier.device

    @property
    def plan(self) -> str:
        return self.classifier.plan


class ActiveVersions(Struct, frozen=True):
    """A release, loaded. ``challenger`` is on trial; without it the champion answers its share."""

    key: int
    deployment: Deployment
    champion: ServedModel
    challenger: ServedModel | None = None

    @property
    def canary(self) -> Canary | None:
        """What is tried here; nothing while the challenger is not loaded, or its device is lost."""
        has_challenger = self.challenger is not None and not self.challenger.classifier.lost
        return self.deployment.canary if has_challenger else None

    @property
    def whole(self) -> bool:
        return (self.challenger is None) == (self.deployment.canary is None)

    def find(self, version: int | None, alias: str | None) -> ServedModel | None:
        """The version of that number or alias, if it serves; the champion without either."""
        for served in (self.champion, self.challenger):
            if served and version in (None, served.version) and alias in (None, served.alias):
                return served
        return None


class Slot(Protocol):
    """One model of this service, whatever version of it is loaded."""

    @property
    def current(self) -> ServedModel | None:
        """The champion; None while nothing is loaded."""

    def require(self) -> ActiveVersions:
        """What serves; raises ``ModelNotReady`` while nothing does."""


AnySlot = TypeVar("AnySlot", bound=Slot)


def find_slot(slots: Mapping[str, AnySlot], name: str | None = None) -> AnySlot:
    """The model ``name``, or the first, which is the default.

    Raises:
        ModelNotFound: there is none of that name.
    """
    if name is None:
        return next(iter(slots.values()))
    if name not in slots:
        raise ModelNotFound(f"there is no model {name!r} here; there are: {', '.join(slots)}")
    return slots[name]
