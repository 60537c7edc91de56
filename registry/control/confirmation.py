"""The text of the page that asks an operator to confirm a decision: what it will change."""

from msgspec import Struct

from registry.model.refs import Canary
from registry.promotion.decision_requests import CanaryStart, DecisionRequest, Promotion, RollBack


class Confirmation(Struct, frozen=True, kw_only=True):
    """A question, the changes that follow a yes, and the text of the button for yes."""

    question: str
    changes: list[str]
    button: str
    is_risky: bool = False


def describe(
    decision: DecisionRequest, champion: int | None, previous: int | None, canary: Canary | None
) -> Confirmation:
    """The confirmation of ``decision``, for a model with these aliases and this canary."""
    if isinstance(decision, Promotion):
        return _promotion(decision, champion, canary)
    if isinstance(decision, RollBack):
        return Confirmation(
            question=f"roll back to version {previous}?",
            changes=[*_new_champion(champion, previous, canary), "The gate does not run."],
            button=f"Yes, roll back to version {previous}",
            is_risky=True,
        )
    if isinstance(decision, CanaryStart):
        started = Canary(version=decision.challenger, share=decision.share, shadow=decision.shadow)
        changes = [
            f"Services start a canary: {started}.",
            f"Version {champion} stays the champion.",
        ]
        if canary is not None:
            changes.append(f"It replaces the canary {canary}.")
        return Confirmation(
            question=f"start a canary of version {decision.challenger}?",
            changes=changes,
            button="Yes, start the canary",
        )
    return Confirmation(
        question="stop the canary?",
        changes=[
            f"The canary {canary} stops." if canary else "There is no canary now.",
            f"Version {champion}, the champion, answers all requests.",
        ],
        button="Yes, stop the canary",
    )


def _promotion(decision: Promotion, champion: int | None, canary: Canary | None) -> Confirmation:
    version = decision.version
    if decision.force:
        gate = "You override the gate. The audit log keeps the gate result and your reason."
    else:
        gate = (
            "The gate compares the two versions first, and may refuse. "
            "That can take a minute if it has not compared them in the last hour."
        )
    changes = [*_new_champion(champion, version, canary), gate]
    if decision.allow_new_classes:
        changes.append("Clients may see other classes than before.")
    return Confirmation(
        question=f"promote version {version}{' against the gate' if decision.force else ''}?",
        changes=changes,
        button=f"Yes, {'override and ' if decision.force else ''}promote version {version}",
        is_risky=decision.force,
    )


def _new_champion(old: int | None, new: int | None, canary: Canary | None) -> list[str]:
    if old is None:
        changes = [f"Version {new} becomes the first champion."]
    else:
        changes = [
            f"The champion changes from version {old} to version {new}.",
            f"Version {old} becomes the previous champion: a roll-back returns to it.",
        ]
    changes.append(f"Services that follow the champion answer with version {new} within seconds.")
    if canary is not None:
        changes.append(f"The canary {canary} stops.")
    return changes
