"""The decisions about a model, as records that an API request or a form fills in."""

from typing import Annotated

from msgspec import Meta, Struct

from registry.model.refs import Canary, Share
from registry.promotion.gate_runner import GateRunner
from registry.promotion.promotion import promote, roll_back, start_canary, stop_canary
from registry.store.audit_log import MAX_TEXT_CHARS, Line
from registry.store.mlflow_store import ModelStore

Number = Annotated[int, Meta(ge=1)]
Expected = Annotated[int, Meta(ge=0)]
"""The number of the champion that the client expects; 0: there is none, or it was deleted."""
Reason = Annotated[str, Meta(max_length=MAX_TEXT_CHARS)]


class Promotion(Struct, forbid_unknown_fields=True, kw_only=True):
    """Make ``version`` the champion.

    ``force`` overrides the gate and needs a reason. ``allow_new_classes`` accepts a version whose
    classes differ, if it passes all checks on the shared classes. In all decisions, ``expect_…``
    names the version that the client expects: if it is a different one by now, the answer is 409.
    """

    version: Number
    expect_champion: Expected | None = None
    force: bool = False
    allow_new_classes: bool = False
    reason: Reason | None = None

    def carry_out(self, store: ModelStore, gate_runner: GateRunner, name: str, by: str) -> Line:
        """Promote if the gate accepts; return the audit log's line. Raises as ``promote`` does."""
        return promote(
            store,
            name,
            self.version,
            expect_champion=self.expect_champion,
            force=self.force,
            allow_new_classes=self.allow_new_classes,
            reason=self.reason,
            gate_runner=gate_runner,
            by=by,
        )


class RollBack(Struct, forbid_unknown_fields=True, kw_only=True):
    """Make the previous champion the champion again, without the gate. That ends a canary."""

    expect_champion: Expected | None = None
    expect_previous: Number | None = None
    reason: Reason | None = None

    def carry_out(self, store: ModelStore, gate_runner: GateRunner, name: str, by: str) -> Line:
        """Roll back without the gate; return the audit log's line. Raises as ``roll_back`` does."""
        return roll_back(
            store,
            name,
            self.reason,
            expect_champion=self.expect_champion,
            expect_previous=self.expect_previous,
            by=by,
        )


class CanaryStart(Struct, forbid_unknown_fields=True, kw_only=True):
    """Have ``challenger`` answer or score a part of the real traffic. That ends any other canary.

    ``share`` is the part of the requests that it answers, ``shadow`` the part of the champion's
    images that it scores too; at least one of them must be above 0.
    """

    challenger: Number
    share: Share = 0.0
    shadow: Share = 0.0
    expect_champion: Expected | None = None
    reason: Reason | None = None

    def carry_out(self, store: ModelStore, gate_runner: GateRunner, name: str, by: str) -> Line:
        """Start it without the gate; return the audit log's line. Raises as ``start_canary``."""
        canary = Canary(version=self.challenger, share=self.share, shadow=self.shadow)
        expected = self.expect_champion
        return start_canary(store, name, canary, self.reason, expect_champion=expected, by=by)


class CanaryStop(Struct, forbid_unknown_fields=True, kw_only=True):
    """End the canary: the champion answers all requests again.

    ``expect_challenger`` names the version that the client expects to be the canary.
    """

    expect_challenger: Number | None = None
    reason: Reason | None = None

    def carry_out(self, store: ModelStore, gate_runner: GateRunner, name: str, by: str) -> Line:
        """End it; return the audit log's line. Raises as ``stop_canary`` does."""
        return stop_canary(
            store, name, self.reason, expect_challenger=self.expect_challenger, by=by
        )


DecisionRequest = Promotion | RollBack | CanaryStart | CanaryStop
BODIES: dict[str, type[DecisionRequest]] = {
    "promote": Promotion,
    "roll-back": RollBack,
    "canary/start": CanaryStart,
    "canary/stop": CanaryStop,
}
