"""``VersionSwitch``: which versions of a model a worker serves, and how the next take over."""

import logging
import time
from collections.abc import Callable

from msgspec import Struct

from registry.delivery.deployment import Deployment
from service.inference.loaded_model import ActiveVersions, ServedModel
from service.loading.worker_sync import WorkerGroup

log = logging.getLogger(__name__)

# A worker prepares a version in about a second. After this time, log the workers that have not.
WAITING_S = 5.0

OnSwitch = Callable[[str, ServedModel | None, ServedModel | None], None]
"""Called with the model's name, the version that served before, and the one that serves now.

The last is None if the new version could not be loaded."""


class Empty(Struct, frozen=True):
    """Nothing is loaded yet, or its device was lost."""

    serving: None = None
    prepared: None = None


class Active(Struct, frozen=True):
    """One deployment serves, and no other is loaded."""

    serving: ActiveVersions
    prepared: None = None


class Prepared(Struct, frozen=True):
    """The next deployment has been loaded since ``since``, and waits for the other workers."""

    serving: ActiveVersions | None
    prepared: ActiveVersions
    since: float


SwitchState = Empty | Active | Prepared


class VersionSwitch:
    """Switches by changing one reference; requests that hold the old object finish with it."""

    def __init__(self, model: str, group: WorkerGroup, on_switch: OnSwitch) -> None:
        self.state: SwitchState = Empty()
        self.waiting: str | None = None
        """Which workers the switch waits for; None unless it has waited for ``WAITING_S``."""
        self._model = model
        self._group = group
        self._active = group.active_deployment(model)
        self._on_switch = on_switch

    @property
    def serving(self) -> ActiveVersions | None:
        """The versions that serve; None if none was loaded yet, or their device was lost."""
        for _ in range(2):  # a switch may fall between reading the state and reading the key
            state, key = self.state, self._active.key
            for each in (state.serving, state.prepared):
                if each is not None and each.key == key:
                    return None if each.champion.classifier.lost else each
        return None

    def others_serve(self) -> Deployment | None:
        """The deployment that the other workers serve; None if this worker serves already."""
        return self._active.deployment if self.state.serving is None else None

    def find(self, deployment: Deployment) -> ActiveVersions | None:
        """The loaded ``deployment``; None if this worker has not loaded all of it."""
        for held in (self.state.serving, self.state.prepared):
            if held is not None and held.deployment == deployment and held.whole:
                return held
        return None

    def prepare(self, prepared: ActiveVersions | None, report: Callable[[], None]) -> None:
        """Replace what was prepared with ``prepared``, unless the workers have switched to that.

        This calls ``report`` while no worker can switch: the other workers must learn of the
        change before the next switch.
        """
        if prepared is self.state.prepared:
            return
        with self._group.locked():
            state = self.state
            if state.prepared is not None and state.prepared.key == self._active.key:
                return  # it already serves: the next poll adopts it
            if prepared is None:
                self.state = Empty() if state.serving is None else Active(state.serving)
            elif state.serving is not None and prepared.key == state.serving.key:
                self.state = Active(prepared)  # the serving deployment, now with its challenger
            else:
                self.state = Prepared(state.serving, prepared, time.monotonic())
            self.waiting = None
            report()

    def commit(self) -> None:
        """Switch all workers to what this one has prepared, if every worker has prepared it."""
        state = self.state
        if not isinstance(state, Prepared):
            return
        missing = self._active.switch(state.prepared.deployment)
        if not missing or time.monotonic() - state.since <= WAITING_S:
            return
        reasons = [f"worker {each.pid}: {each.error or 'not prepared yet'}" for each in missing]
        generation = state.prepared.deployment.generation
        text = f"generation {generation} waits for {'; '.join(reasons)}"
        if text != self.waiting:
            log.warning("%s: %s", self._model, text)
            self.waiting = text

    def adopt(self) -> ActiveVersions | None:
        """Make the prepared deployment the serving one, if the workers have switched to it.

        Returns it; None if they have not.
        """
        before, fresh = self.state.serving, self.state.prepared
        if fresh is None or fresh.key != self._active.key:
            return None
        self.state = Active(fresh)
        self.waiting = None
        left = before.champion if before else None
        self._on_switch(self._model, left, fresh.champion)
        log.info(
            "serving %s version %d on %s by %s (before: %s)%s",
            self._model,
            fresh.champion.version,
            fresh.champion.device,
            fresh.champion.plan,
            left.version if left else "none",
            f"; canary: {fresh.canary}" if fresh.canary else "",
        )
        return fresh

    def replace_serving(self, serving: ActiveVersions | None) -> None:
        """Replace the serving versions of this deployment, because a device was lost."""
        if serving is None:
            self.state = Empty()
        elif isinstance(self.state, Prepared):
            self.state = Prepared(serving, self.state.prepared, self.state.since)
        else:
            self.state = Active(serving)

    def in_use(self) -> list[ServedModel]:
        """The versions that serve or are prepared."""
        held = [each for each in (self.state.serving, self.state.prepared) if each]
        return [each for serving in held for each in (serving.champion, serving.challenger) if each]
