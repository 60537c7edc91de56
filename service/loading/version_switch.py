"""``VersionSwitch``: what a worker serves of a model, and how the next version takes over."""

import logging
import time
from collections.abc import Callable

from msgspec import Struct

from registry.delivery.deployment import Deployment
from service.inference.loaded_model import ActiveVersions, ServedModel
from service.loading.worker_sync import WorkerGroup

log = logging.getLogger(__name__)

# A worker that prepares takes a second; one that does not is worth a word.
WAITING_S = 5.0

OnSwitch = Callable[[str, ServedModel | None, ServedModel | None], None]
"""Told the model's name, what served before, and what serves now (None: it was refused)."""


class Empty(Struct, frozen=True):
    """Nothing is loaded yet, or its device was lost."""

    serving: None = None
    prepared: None = None


class Active(Struct, frozen=True):
    """One deployment serves, and no other is ready."""

    serving: ActiveVersions
    prepared: None = None


class Prepared(Struct, frozen=True):
    """The next deployment is loaded since ``since``, and waits for the other workers."""

    serving: ActiveVersions | None
    prepared: ActiveVersions
    since: float


SwitchState = Empty | Active | Prepared


class VersionSwitch:
    """One reference changes; requests that hold the old object finish on it."""

    def __init__(self, model: str, group: WorkerGroup, on_switch: OnSwitch) -> None:
        self.state: SwitchState = Empty()
        self.waiting: str | None = None
        """Which workers are not ready, if that has lasted."""
        self._model = model
        self._group = group
        self._active = group.active_deployment(model)
        self._on_swap = on_switch

    @property
    def serving(self) -> ActiveVersions | None:
        """What serves; None when nothing was loaded yet, or its device was lost since."""
        for _ in range(2):  # between the two reads another may have been prepared and switched to
            state, key = self.state, self._active.key
            for each in (state.serving, state.prepared):
                if each is not None and each.key == key:
                    return None if each.champion.classifier.lost else each
        return None

    def others_serve(self) -> Deployment | None:
        """What the other workers serve, for a worker that has nothing yet."""
        return self._active.deployment if self.state.serving is None else None

    def find(self, deployment: Deployment) -> ActiveVersions | None:
        """``deployment``, if this worker has loaded all of it."""
        for held in (self.state.serving, self.state.prepared):
            if held is not None and held.deployment == deployment and held.whole:
                return held
        return None

    def prepare(self, prepared: ActiveVersions | None, report: Callable[[], None]) -> None:
        """Have ``prepared`` ready instead of what was; not while the workers switch to that.

        ``report`` tells the other workers, which must not switch before they are told.
        """
        if prepared is self.state.prepared:
            return
        with self._group.locked():
            state = self.state
            if state.prepared is not None and state.prepared.key == self._active.key:
                return  # it serves already: the next poll adopts it
            if prepared is None:
                self.state = Empty() if state.serving is None else Active(state.serving)
            elif state.serving is not None and prepared.key == state.serving.key:
                self.state = Active(prepared)  # what serves, made whole
            else:
                self.state = Prepared(state.serving, prepared, time.monotonic())
            self.waiting = None
            report()

    def commit(self) -> None:
        """Have all workers serve what this one has prepared, if every one of them has."""
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

    def adopt(self) -> bool:
        """Note that the workers have switched to what this one had prepared; whether they have."""
        before, fresh = self.state.serving, self.state.prepared
        if fresh is None or fresh.key != self._active.key:
            return False
        self.state = Active(fresh)
        self.waiting = None
        left = before.champion if before else None
        self._on_swap(self._model, left, fresh.champion)
        log.info(
            "serving %s version %d on %s by %s (before: %s)%s",
            self._model,
            fresh.champion.version,
            fresh.champion.device,
            fresh.champion.plan,
            left.version if left else "none",
            f"; on trial: {fresh.canary}" if fresh.canary else "",
        )
        return True

    def replace_serving(self, serving: ActiveVersions | None) -> None:
        """Serve ``serving`` of the same deployment from now on: a device was lost."""
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
