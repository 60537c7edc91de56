"""What can be decided about a model, as a record that a program or a form fills in."""

from typing import Annotated

from msgspec import Meta, Struct

from registry.model.refs import Share, Trial
from registry.promotion.gate_runner import Judge
from registry.promotion.promotion import promote, release, roll_back, withdraw
from registry.store.audit_log import MAX_TEXT_CHARS, Line
from registry.store.mlflow_store import ModelStore

Number = Annotated[int, Meta(ge=1)]
Reason = Annotated[str, Meta(max_length=MAX_TEXT_CHARS)]


class Promotion(Struct, forbid_unknown_fields=True, kw_only=True):
    """Make ``version`` the champion; ``force`` whatever the gate says, with a reason.

    ``allow_new_classes`` accepts a version of other classes, if it passes on those that both have.
    As in the others, ``expect_…`` refuses with 409 when it is another by then.
    """

    version: Number
    expect_champion: Number | None = None
    force: bool = False
    allow_new_classes: bool = False
    reason: Reason | None = None

    def carry_out(self, store: ModelStore, judge: Judge, name: str, by: str) -> Line:
        return promote(
            store,
            name,
            self.version,
            expect_champion=self.expect_champion,
            force=self.force,
            allow_new_classes=self.allow_new_classes,
            reason=self.reason,
            judge=judge,
            by=by,
        )


class RollBack(Struct, forbid_unknown_fields=True, kw_only=True):
    expect_champion: Number | None = None
    reason: Reason | None = None

    def carry_out(self, store: ModelStore, judge: Judge, name: str, by: str) -> Line:
        return roll_back(store, name, self.reason, expect_champion=self.expect_champion, by=by)


class TrialRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    challenger: Number
    share: Share = 0.0
    shadow: Share = 0.0
    expect_champion: Number | None = None
    reason: Reason | None = None

    def carry_out(self, store: ModelStore, judge: Judge, name: str, by: str) -> Line:
        trial = Trial(version=self.challenger, share=self.share, shadow=self.shadow)
        expected = self.expect_champion
        return release(store, name, trial, self.reason, expect_champion=expected, by=by)


class Withdrawal(Struct, forbid_unknown_fields=True, kw_only=True):
    expect_challenger: Number | None = None
    reason: Reason | None = None

    def carry_out(self, store: ModelStore, judge: Judge, name: str, by: str) -> Line:
        return withdraw(store, name, self.reason, expect_challenger=self.expect_challenger, by=by)


Decision = Promotion | RollBack | TrialRequest | Withdrawal
BODIES: dict[str, type[Decision]] = {
    "promote": Promotion,
    "roll-back": RollBack,
    "release": TrialRequest,
    "withdraw": Withdrawal,
}
