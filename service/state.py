"""``State``: the parts that every request uses, and ``state()``, which returns them."""

from flask import current_app
from msgspec import Struct

from service.access.auth import AccessControl
from service.inference.loaded_model import find_slot
from service.inference.pipeline import Pipeline
from service.loading.model_slot import ModelSlot
from service.loading.open_slots import Slots
from service.loading.watchdog import Watchdog
from service.observability.metrics import Metrics
from service.observability.request_recorder import RequestRecorder
from service.settings import Settings


class State(Struct, frozen=True, kw_only=True):
    """The parts of one worker that its requests share; made once, and never replaced."""

    settings: Settings
    slots: Slots
    metrics: Metrics
    watchdog: Watchdog
    access_control: AccessControl
    pipeline: Pipeline
    recorder: RequestRecorder | None = None
    """Records requests for traces and the access log; None if both are off."""

    def slot(self, name: str) -> ModelSlot:
        """The slot of the model ``name``; raises ``ModelNotFound``."""
        return find_slot(self.slots, name)


def state() -> State:
    """The state of the app that handles this request."""
    found: State = current_app.extensions["convoy"]
    return found
