"""What hangs on the app, and the one way to reach it from a request."""

from flask import current_app
from msgspec import Struct

from registry.core.errors import (
    ModelNotFound,
    ModelNotReady,
    VersionNotFound,
)
from service.access.auth import Door
from service.inference.loaded_model import ServedModel, Serving
from service.loading.deployment_watcher import ModelSlot
from service.loading.loader import Slots
from service.loading.watchdog import Watchdog
from service.observability.metrics import Metrics
from service.settings import Settings
from service.shadow.client import ShadowFeed


class State(Struct, frozen=True, kw_only=True):
    settings: Settings
    slots: Slots
    metrics: Metrics
    shadow: ShadowFeed
    watchdog: Watchdog
    door: Door

    def served(
        self, name: str | None = None, version: int | None = None, alias: str | None = None
    ) -> tuple[ServedModel, Serving]:
        """The loaded version that a request's path means, and what else serves at this moment.

        Raises:
            ModelNotFound, VersionNotFound: it is not served here.
            ModelNotReady: it will be, but is not loaded yet.
        """
        if self.watchdog.reason:
            raise ModelNotReady(self.watchdog.reason)
        serving = self.slot(name).require()
        served = serving.find(version, alias)
        if served is None:
            wanted = f"version {version}" if alias is None else f"alias {alias!r}"
            here = " and ".join(
                f"version {each.version}" + (f", alias {each.alias!r}" if each.alias else "")
                for each in (serving.champion, serving.challenger)
                if each
            )
            raise VersionNotFound(
                f"{serving.champion.name} {wanted} is not served here; served is {here}"
            )
        return served, serving

    def slot(self, name: str | None = None) -> ModelSlot:
        if name is None:
            return next(iter(self.slots.values()))
        if name not in self.slots:
            raise ModelNotFound(
                f"there is no model {name!r} here; there are: {', '.join(self.slots)}"
            )
        return self.slots[name]


def state() -> State:
    """The state of the app that handles this request."""
    found: State = current_app.extensions["convoy"]
    return found
