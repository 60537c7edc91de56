"""Promote, roll back, start and stop a canary: checks what the decision needs, then carries it out.

``registry.promotion.decisions`` writes the decision to the audit log and moves the aliases.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from registry.core.errors import PromotionConflict, PromotionRefused, UsageError, VersionNotFound
from registry.core.paths import convoy_paths
from registry.model.refs import Canary, ModelRef, ModelVersion
from registry.promotion.decisions import (
    Decision,
    carry_out,
    check_reason,
    reconcile,
    reconcile_at,
)
from registry.store.audit_log import Action, Line
from registry.store.mlflow_store import ModelStore

if TYPE_CHECKING:
    from registry.promotion.gate_runner import GateResult, GateRunner

ALLOW_NEW_CLASSES = ". The classes differ: --allow-new-classes accepts that, if every check passes"


def promote(  # noqa: PLR0913 - keyword-only, each with a default
    store: ModelStore,
    name: str,
    version: int,
    *,
    expect_champion: int | None = None,
    force: bool = False,
    allow_new_classes: bool = False,
    reason: str | None = None,
    gate_runner: "GateRunner | None" = None,
    by: str | None = None,
    on_result: "Callable[[GateResult], None]" = lambda result: None,
) -> Line:
    """Make ``version`` the champion of ``name`` if the gate accepts it. That ends a canary.

    Args:
        store: the registry.
        name: the model.
        version: the challenger's number.
        expect_champion: the version that must be the champion; by default the one that the gate
            compares with.
        force: promote even if the gate refuses; this needs a ``reason``.
        allow_new_classes: promote a version whose classes differ, if it passes all checks on the
            classes that both have.
        reason: why, for the audit log.
        gate_runner: the gate; by default one that does not time forward passes.
        by: the name of the person who decides; by default the user of this process.
        on_result: called with the gate result before the decision is written.

    Returns:
        The line of the audit log, with the gate result as text.

    Raises:
        PromotionRefused: the gate refuses the version; the refusal is in the audit log. Or the
            version is the champion already.
        PromotionConflict: the champion is not the expected one, or another decision came first.
        VersionNotFound: there is no such version.
        UsageError: ``force`` without a reason, or the reason is too long.
    """
    # A roll-back, which needs neither numpy nor the gate, must not wait for this import.
    from registry.promotion.gate_runner import GateRunner

    if force and not (reason or "").strip():
        raise UsageError("--force needs --reason: the audit log records it with the decision")
    check_reason(reason)
    challenger = store.resolve(ModelRef(name, version))
    audit_log = reconcile_at(store, name, expect_champion)
    if audit_log.champion == version:
        raise PromotionRefused(f"{name} version {version} is the champion already")
    champion = store.find_any(name, audit_log.champion)
    result = (gate_runner or GateRunner(store, convoy_paths(), timed=False)).run(
        champion, challenger
    )
    on_result(result)
    details = result.summary
    if champion is None and audit_log.champion is not None:
        details += f" (version {audit_log.champion}, the champion, is gone from the registry)"
    accepted = result.accepts(allow_new_classes=allow_new_classes)
    if accepted and not result.accepted:
        details += "; --allow-new-classes allowed the new classes"
    action: Action = "promoted" if accepted else "forced" if force else "refused"
    decision = Decision(
        action=action,
        version=version,
        to=challenger,
        left=champion if isinstance(champion, ModelVersion) else None,
        reason=reason,
        by=by,
        details=details,
    )
    line = carry_out(store, name, audit_log, decision)
    if action == "refused":
        differ = result.comparison is not None and result.comparison.class_changes
        advice = ALLOW_NEW_CLASSES if differ and not allow_new_classes else ""
        raise PromotionRefused(
            f"{name} version {version} is refused by the gate: {details}{advice}"
        )
    return line


def roll_back(
    store: ModelStore,
    name: str,
    reason: str | None = None,
    *,
    expect_champion: int | None = None,
    expect_previous: int | None = None,
    by: str | None = None,
) -> Line:
    """Make the previous champion champion again, without the gate. That ends a canary.

    The present champion becomes ``previous``, so a second roll-back undoes one made by mistake.

    Raises:
        VersionNotFound: there is no previous champion.
        PromotionConflict: the champion or the previous one is not the expected one, or another
            decision came first.
    """
    check_reason(reason)
    audit_log = reconcile_at(store, name, expect_champion)
    if audit_log.previous is None:
        raise VersionNotFound(f"{name} has no previous champion to roll back to")
    if expect_previous not in (None, audit_log.previous):
        raise PromotionConflict(
            f"{name}: the previous champion is version {audit_log.previous}, not {expect_previous}"
        )
    back = store.resolve(ModelRef(name, audit_log.previous))
    decision = Decision(
        action="rolled back",
        version=back.version,
        to=back,
        left=store.find(name, audit_log.champion),
        reason=reason,
        by=by,
    )
    return carry_out(store, name, audit_log, decision)


def start_canary(
    store: ModelStore,
    name: str,
    canary: Canary,
    reason: str | None = None,
    *,
    expect_champion: int | None = None,
    by: str | None = None,
) -> Line:
    """Have a challenger answer or shadow a part of the real traffic. That ends any other canary.

    The gate does not run: a canary is a way to find out how good a version is. But the champion and
    the challenger must have the same labels, because clients do not choose which of them answers.

    Raises:
        UsageError: the canary has neither a share nor a shadow.
        PromotionRefused: there is no champion, the version is the champion, or the labels differ.
        PromotionConflict: the champion is not the expected one, or another decision came first.
        VersionNotFound: there is no such version.
    """
    check_reason(reason)
    if not canary.share and not canary.shadow:
        raise UsageError("a canary needs a share of the requests, a shadow, or both")
    challenger = store.resolve(ModelRef(name, canary.version))
    audit_log = reconcile_at(store, name, expect_champion)
    champion = store.find(name, audit_log.champion)
    if champion is None:
        raise PromotionRefused(
            f"{name} has no champion; promote a version before you start a canary"
        )
    if champion.version == canary.version:
        raise PromotionRefused(f"{name} version {canary.version} is the champion already")
    from registry.promotion.pairing import describe_classes

    labels, others = store.manifest(champion).labels, store.manifest(challenger).labels
    if changes := describe_classes(labels, others):
        raise PromotionRefused(
            f"the labels differ, so clients would get different answers: {'; '.join(changes)}"
        )
    decision = Decision(
        action="canary started",
        version=canary.version,
        to=challenger,
        left=champion,
        reason=reason,
        by=by,
        details=str(canary),
        canary=canary,
    )
    return carry_out(store, name, audit_log, decision)


def stop_canary(
    store: ModelStore,
    name: str,
    reason: str | None = None,
    *,
    expect_challenger: int | None = None,
    by: str | None = None,
) -> Line:
    """End the canary; the champion answers all requests again.

    Raises:
        VersionNotFound: there is no canary.
        PromotionConflict: the canary is not ``expect_challenger``, or another decision came first.
    """
    check_reason(reason)
    audit_log = reconcile(store, name)
    if audit_log.canary is None:
        raise VersionNotFound(f"no version of {name} is a canary")
    number = audit_log.canary.version
    if expect_challenger not in (None, number):
        raise PromotionConflict(f"{name}: the canary is version {number}, not {expect_challenger}")
    decision = Decision(
        action="canary stopped",
        version=number,
        to=store.find(name, number),
        left=store.find(name, audit_log.champion),
        reason=reason,
        by=by,
        details=str(audit_log.canary),
    )
    return carry_out(store, name, audit_log, decision)


def note_refusal(store: ModelStore, version: ModelVersion, details: str, by: str) -> None:
    """Record, once, that the machine ``by`` cannot serve ``version``; later reasons are dropped."""
    store.names.check_log(version.name)
    audit_log = store.audit_logs.read(version.name)
    refused = "refused", version.manifest_sha256, by
    for line in audit_log.lines:
        if refused == (line.entry.action, line.entry.to_manifest_sha256, line.entry.by):
            return
    decision = Decision(
        action="refused", version=version.version, to=version, by=by, details=details
    )
    carry_out(store, version.name, audit_log, decision)
