"""What programs send to the control plane to have something decided."""

from typing import Annotated

from msgspec import Meta, Struct

from registry.contract import Share

Number = Annotated[int, Meta(ge=1)]
Reason = Annotated[str, Meta(max_length=10_000)]


class Promotion(Struct, forbid_unknown_fields=True, kw_only=True):
    """Make ``version`` the champion; ``force`` whatever the gate says, with a reason.

    As in the others, ``expect_…`` refuses with 409 when it is another by then.
    """

    version: Number
    expect_champion: Number | None = None
    force: bool = False
    reason: Reason | None = None


class RollBack(Struct, forbid_unknown_fields=True, kw_only=True):
    expect_champion: Number | None = None
    reason: Reason | None = None


class TrialRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    challenger: Number
    share: Share = 0.0
    shadow: Share = 0.0
    expect_champion: Number | None = None
    reason: Reason | None = None


class Withdrawal(Struct, forbid_unknown_fields=True, kw_only=True):
    expect_challenger: Number | None = None
    reason: Reason | None = None


BODIES: dict[str, type[Struct]] = {
    "promote": Promotion,
    "roll-back": RollBack,
    "release": TrialRequest,
    "withdraw": Withdrawal,
}
