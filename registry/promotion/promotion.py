"""Promote, try and take back: the decision written into the ledger, then what serves moved.

In that order. The ledger decides between people who do so at once (``registry.store.audit_log``),
and the aliases follow it: whoever wrote a line points them at what the whole ledger says, and looks
again. So after the last of any number of racing promotions, aliases and ledger agree.
"""

import getpass
import logging
import os
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime

from registry.core.errors import PromotionConflict, PromotionRefused, UsageError, VersionNotFound
from registry.core.paths import convoy_paths
from registry.model.refs import CHAMPION, PREVIOUS, Canary, ModelRef, ModelVersion
from registry.promotion.gate_runner import GateResult, GateRunner
from registry.promotion.pairing import describe_classes
from registry.store.audit_log import MAX_TEXT_CHARS, Action, AuditLog, Entry, Line
from registry.store.mlflow_store import ModelStore

log = logging.getLogger(__name__)

# Between its line and its alias a promotion calls the registry a few times; each of them may take
# MLflow's time-out, 10 s, and be tried again.
RECONCILE_TIMEOUT_S = 25.0
POLL_INTERVAL_S = 0.25
ALLOWING = ". The classes differ: --allow-new-classes accepts that, if every check passes"


def promote(
    store: ModelStore,
    name: str,
    version: int,
    *,
    expect_champion: int | None = None,
    force: bool = False,
    allow_new_classes: bool = False,
    reason: str | None = None,
    gate_runner: GateRunner | None = None,
    by: str | None = None,
    on_result: Callable[[GateResult], None] = lambda result: None,
) -> Line:
    """Make ``version`` the champion of ``name`` if the gate lets it. That ends a trial.

    Args:
        store: the registry.
        name: the model.
        version: the challenger's number.
        expect_champion: the version that must be the champion; by default the one that the gate
            compares with.
        force: promote whatever the gate says; then ``reason`` is needed and recorded.
        allow_new_classes: promote a version whose classes differ, if it passes all checks on the
            classes that both have.
        reason: why, for the record.
        judge: the gate; by default one that times no forward passes.
        by: who decides; by default the user of this process.
        on_judged: told the judgement, before it is acted upon.

    Returns:
        The ledger's line, with the gate's verdict or objection as text.

    Raises:
        PromotionRefused: the gate says no; the refusal is recorded.
        PromotionConflict: the champion is not the expected one, or was moved by somebody else.
        VersionNotFound: no such version.
        UsageError: ``force`` without a reason.
    """
    if force and not (reason or "").strip():
        raise UsageError("--force needs --reason: it is recorded with the decision")
    _check_text(reason)
    challenger = store.resolve(ModelRef(name, version))
    audit_log = _reconcile_at(store, name, expect_champion)
    if audit_log.champion == version:
        raise PromotionRefused(f"{name} version {version} is the champion already")
    champion = store.champion(name, audit_log.champion)
    result = (gate_runner or GateRunner(store, convoy_paths(), timed=False)).run(
        champion, challenger
    )
    on_result(result)
    details = result.summary
    if champion is None and audit_log.champion is not None:
        details += f" (version {audit_log.champion}, the champion, is gone from the registry)"
    accepted = result.accepts(allow_new_classes=allow_new_classes)
    if accepted and not result.accepted:
        details += "; other classes were allowed by --allow-new-classes"
    action: Action = "promoted" if accepted else "forced" if force else "refused"
    line = _write(
        store,
        name,
        audit_log,
        action,
        version,
        to=challenger,
        left=champion if isinstance(champion, ModelVersion) else None,
        reason=reason,
        by=by,
        details=details,
    )
    if action == "refused":
        differ = result.comparison is not None and result.comparison.class_changes
        how = ALLOWING if differ and not allow_new_classes else ""
        raise PromotionRefused(f"{name} version {version} is refused: {details}{how}")
    return line


def roll_back(
    store: ModelStore,
    name: str,
    reason: str | None = None,
    *,
    expect_champion: int | None = None,
    by: str | None = None,
) -> Line:
    """Make the previous champion champion again, without a gate. That ends a trial.

    The version that is left becomes ``previous``, so a roll-back by mistake is undone by another.

    Raises:
        VersionNotFound: there is nothing to go back to.
        PromotionConflict: the champion is not the expected one, or was moved by somebody else.
    """
    _check_text(reason)
    audit_log = _reconcile_at(store, name, expect_champion)
    if audit_log.previous is None:
        raise VersionNotFound(f"{name} has no previous champion to roll back to")
    back = store.resolve(ModelRef(name, audit_log.previous))
    left = store.find(name, audit_log.champion)
    number = back.version
    return _write(
        store, name, audit_log, "rolled back", number, to=back, left=left, reason=reason, by=by
    )


def start_canary(
    store: ModelStore,
    name: str,
    canary: Canary,
    reason: str | None = None,
    *,
    expect_champion: int | None = None,
    by: str | None = None,
) -> Line:
    """Try a challenger on real traffic beside the champion; another trial ends.

    No gate is asked: who wants to know how a version does has not found out yet. But both must give
    the same labels, as callers do not choose whose answer they get.

    Raises:
        UsageError: neither a share nor a shadow.
        PromotionRefused: there is no champion beside which to try it, it is the champion, or the
            labels differ.
        PromotionConflict: the champion is not the expected one, or was moved by somebody else.
        VersionNotFound: no such version.
    """
    _check_text(reason)
    if not canary.share and not canary.shadow:
        raise UsageError("a trial needs a share of the requests, a shadow, or both")
    challenger = store.resolve(ModelRef(name, canary.version))
    audit_log = _reconcile_at(store, name, expect_champion)
    champion = store.find(name, audit_log.champion)
    if champion is None:
        raise PromotionRefused(f"{name} has no champion beside which a version could be tried")
    if champion.version == canary.version:
        raise PromotionRefused(f"{name} version {canary.version} is the champion already")
    labels, others = store.manifest(champion).labels, store.manifest(challenger).labels
    if changes := describe_classes(labels, others):
        raise PromotionRefused(
            f"the labels differ, so callers would get other answers: {'; '.join(changes)}"
        )
    return _write(
        store,
        name,
        audit_log,
        "canary started",
        canary.version,
        to=challenger,
        left=champion,
        reason=reason,
        by=by,
        details=str(canary),
        canary=canary,
    )


def stop_canary(
    store: ModelStore,
    name: str,
    reason: str | None = None,
    *,
    expect_challenger: int | None = None,
    by: str | None = None,
) -> Line:
    """End the trial of a challenger; the champion answers everything again.

    Raises:
        VersionNotFound: nothing is on trial.
        PromotionConflict: another version is on trial than ``expect_challenger``, or somebody else
            moved something meanwhile.
    """
    _check_text(reason)
    audit_log = reconcile(store, name)
    if audit_log.canary is None:
        raise VersionNotFound(f"no version of {name} is on trial")
    number = audit_log.canary.version
    if expect_challenger not in (None, number):
        raise PromotionConflict(f"{name}: version {number} is on trial, not {expect_challenger}")
    return _write(
        store,
        name,
        audit_log,
        "canary stopped",
        number,
        to=store.find(name, number),
        left=store.find(name, audit_log.champion),
        reason=reason,
        by=by,
        details=str(audit_log.canary),
    )


def note_refusal(store: ModelStore, version: ModelVersion, details: str, by: str) -> None:
    """Write down that a machine could not serve ``version``; once, whatever the reasons after."""
    store.check_log(version.name)
    audit_log = store.audit_log(version.name)
    refused = "refused", version.manifest_sha256, by
    for line in audit_log.lines:
        if refused == (line.entry.action, line.entry.to_manifest_sha256, line.entry.by):
            return
    number = version.version
    _write(store, version.name, audit_log, "refused", number, to=version, by=by, details=details)


def reconcile(store: ModelStore, name: str) -> AuditLog:
    """The ledger of ``name``, once the champion's alias agrees with it.

    Where it does not, somebody is promoting at this moment, so it is waited for. If it stays so,
    the alias was moved by other means, or who promoted died before moving it: what serves is then
    written down as *adopted*, so that the ledger says what is. Where nothing serves, as there is no
    alias, it is put where the ledger says.
    """
    store.check_log(name)
    before: object = None
    deadline = 0.0
    while True:
        audit_log, (aliases, canary) = store.audit_log(name), store.aliases_and_canary(name)
        alias = aliases.get(CHAMPION)
        if alias == audit_log.champion:
            # A trial's tag that is another was left behind by who died before moving it.
            is_left = audit_log.lines and canary != audit_log.canary
            return _follow(store, name) if is_left else audit_log
        if alias is None and store.find(name, audit_log.champion) is None:
            return audit_log  # the champion was deleted, and its alias with it
        if before != (audit_log.last, alias):  # a disagreement of its own, not the last one's
            before, deadline = (audit_log.last, alias), time.monotonic() + RECONCILE_TIMEOUT_S
        if not audit_log.champion_moves or time.monotonic() >= deadline:
            break
        time.sleep(POLL_INTERVAL_S)
    if alias is None:
        return _follow(store, name)
    log.warning("%s: version %d was made the champion by other means", name, alias)
    _write(
        store,
        name,
        audit_log,
        "adopted",
        alias,
        to=store.find(name, alias),
        details=f"the ledger said version {audit_log.champion}",
        # Of before there was a ledger: it can be rolled back all the same.
        instead_of=None if audit_log.champion_moves else aliases.get(PREVIOUS),
    )
    return store.audit_log(name)


def audit(store: ModelStore, name: str) -> tuple[int, list[str]]:
    """How many lines a log has, and what is wrong with it and with what should follow it.

    Lines that are missing or unreadable, a log that publishing did not make, aliases that disagree.
    A line that an account with write access to the registry has rewritten is not found.
    """
    newest = store.newest_line(name)  # first: what is written meanwhile is no fault
    audit_log = store.audit_log(name)
    aliases, canary = store.aliases_and_canary(name)
    faults = audit_log.faults(newest)
    try:
        store.check_log(name)
    except PromotionRefused as error:
        faults.append(str(error))
    said = {CHAMPION: audit_log.champion, PREVIOUS: audit_log.previous} if audit_log.last else {}
    here = {version.version for version, _ in store.versions(name)}
    faults += [
        f"the alias {alias} is at version {aliases.get(alias)}, the ledger says {version}"
        for alias, version in said.items()
        if aliases.get(alias) != version and (version is None or version in here)
    ]
    if canary != audit_log.canary:
        faults.append(f"on trial is {canary or 'nothing'}, the ledger says {audit_log.canary}")
    return len(audit_log.lines), faults


def _reconcile_at(store: ModelStore, name: str, expect_champion: int | None) -> AuditLog:
    audit_log = reconcile(store, name)
    if expect_champion not in (None, audit_log.champion):
        raise PromotionConflict(
            f"{name}: the champion is version {audit_log.champion}, not {expect_champion}"
        )
    return audit_log


def _write(
    store: ModelStore,
    name: str,
    audit_log: AuditLog,
    action: Action,
    version: int,
    *,
    to: ModelVersion | None,
    left: ModelVersion | None = None,
    reason: str | None = None,
    by: str | None = None,
    details: str | None = None,
    canary: Canary | None = None,
    instead_of: int | None = None,
) -> Line:
    """Append a line and carry it out; ``PromotionConflict`` if another move came first.

    ``version`` is the number that it is about, ``to`` that version where there still is one;
    ``left`` was champion, or where nobody knows it any more, the number ``instead_of``.
    """
    entry = audit_log.continued(
        Entry(
            action=action,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            by=by or _user(),
            from_version=audit_log.champion if instead_of is None else instead_of,
            to_version=version,
            from_manifest_sha256=left.manifest_sha256 if left else None,
            to_manifest_sha256=to.manifest_sha256 if to else None,
            reason=reason,
            details=details,
            canary=canary,
            nonce=secrets.token_hex(8),
        )
    )
    store.append(name, entry)
    after = _follow(store, name, moved=entry.move is not None)
    written = [line for line in after.lines if line.entry.nonce == entry.nonce]
    line = next((line for line in written if line.stands), None)
    moves = after.moves
    if line is None:
        first = next(each.entry for each in moves if (each.entry.move or 0) >= (entry.move or 0))
        raise PromotionConflict(
            f"{name}: {first.by} {first.action} version {first.to_version} at the same time, and "
            "came first; look again, then decide"
        )
    undone = next((each for each in moves if each.number > line.number), None)
    if entry.move is not None and undone is not None and undone.entry.action == "adopted":
        raise PromotionConflict(
            f"{name}: it took so long to move the alias that version {undone.entry.to_version}, "
            "which still served, was taken for the champion; look again, then decide"
        )
    return line


def _follow(store: ModelStore, name: str, *, moved: bool = True) -> AuditLog:
    """Note the newest line, and where a line ``moved`` something, have the registry say so.

    Until the ledger says the same still after that.
    """
    audit_log = store.audit_log(name)
    while True:
        store.note_newest(name, audit_log)
        if moved:
            store.set_aliases(
                name,
                champion=audit_log.champion,
                previous=audit_log.previous,
                canary=audit_log.canary,
            )
        seen, audit_log = audit_log.last, store.audit_log(name)
        if audit_log.last == seen:
            return audit_log


def _user() -> str:
    """The user of this process, marked: ``$LOGNAME`` says what its user wants, and proves nothing.

    Names of tokens, which the control plane has checked, have neither spaces nor parentheses.
    """
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's number without a name
        name = f"uid {os.getuid()}"
    return f"{name} (unverified)"


def _check_text(reason: str | None) -> None:
    if len(reason or "") > MAX_TEXT_CHARS:
        raise UsageError(
            f"the reason has {len(reason or ''):,} characters; it may have {MAX_TEXT_CHARS:,}"
        )
    try:
        (reason or "").encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the reason is not UTF-8: {error}") from error
