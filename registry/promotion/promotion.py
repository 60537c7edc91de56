"""Promote, roll back, start and stop a canary: write the decision to the audit log, then apply it.

The order matters. If several operators decide at once, the audit log says whose decision stands
(``registry.store.audit_log``), and the aliases follow the log: after a process has written a line,
it sets the aliases to what all lines together say, and reads the log again. So when the last of
several concurrent promotions has ended, the aliases agree with the log.
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

# Between its line and its alias a promotion calls the registry a few times. Each call may take
# MLflow's time-out, 10 s, and is retried.
RECONCILE_TIMEOUT_S = 25.0
POLL_INTERVAL_S = 0.25
# As ``expect_champion``: the caller expects no champion, or that its version was deleted.
NO_CHAMPION = 0
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
    gate_runner: GateRunner | None = None,
    by: str | None = None,
    on_result: Callable[[GateResult], None] = lambda result: None,
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
    if force and not (reason or "").strip():
        raise UsageError("--force needs --reason: the audit log records it with the decision")
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
        details += "; --allow-new-classes allowed the new classes"
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
    _check_text(reason)
    audit_log = _reconcile_at(store, name, expect_champion)
    if audit_log.previous is None:
        raise VersionNotFound(f"{name} has no previous champion to roll back to")
    if expect_previous not in (None, audit_log.previous):
        raise PromotionConflict(
            f"{name}: the previous champion is version {audit_log.previous}, not {expect_previous}"
        )
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
    """Have a challenger answer or shadow a part of the real traffic. That ends any other canary.

    The gate does not run: a canary is a way to find out how good a version is. But the champion and
    the challenger must have the same labels, because clients do not choose which of them answers.

    Raises:
        UsageError: the canary has neither a share nor a shadow.
        PromotionRefused: there is no champion, the version is the champion, or the labels differ.
        PromotionConflict: the champion is not the expected one, or another decision came first.
        VersionNotFound: there is no such version.
    """
    _check_text(reason)
    if not canary.share and not canary.shadow:
        raise UsageError("a canary needs a share of the requests, a shadow, or both")
    challenger = store.resolve(ModelRef(name, canary.version))
    audit_log = _reconcile_at(store, name, expect_champion)
    champion = store.find(name, audit_log.champion)
    if champion is None:
        raise PromotionRefused(
            f"{name} has no champion; promote a version before you start a canary"
        )
    if champion.version == canary.version:
        raise PromotionRefused(f"{name} version {canary.version} is the champion already")
    labels, others = store.manifest(champion).labels, store.manifest(challenger).labels
    if changes := describe_classes(labels, others):
        raise PromotionRefused(
            f"the labels differ, so clients would get different answers: {'; '.join(changes)}"
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
    """End the canary; the champion answers all requests again.

    Raises:
        VersionNotFound: there is no canary.
        PromotionConflict: the canary is not ``expect_challenger``, or another decision came first.
    """
    _check_text(reason)
    audit_log = reconcile(store, name)
    if audit_log.canary is None:
        raise VersionNotFound(f"no version of {name} is a canary")
    number = audit_log.canary.version
    if expect_challenger not in (None, number):
        raise PromotionConflict(f"{name}: the canary is version {number}, not {expect_challenger}")
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
    """Record, once, that the machine ``by`` cannot serve ``version``; later reasons are dropped."""
    store.check_log(version.name)
    audit_log = store.audit_log(version.name)
    refused = "refused", version.manifest_sha256, by
    for line in audit_log.lines:
        if refused == (line.entry.action, line.entry.to_manifest_sha256, line.entry.by):
            return
    number = version.version
    _write(store, version.name, audit_log, "refused", number, to=version, by=by, details=details)


def reconcile(store: ModelStore, name: str) -> AuditLog:
    """The audit log of ``name``, once the champion's alias agrees with it.

    If the two disagree, another process may be between its line and its alias, so this waits for up
    to ``RECONCILE_TIMEOUT_S``. If they still disagree, the alias was moved outside Convoy, or a
    promoting process died before it moved the alias. What serves counts then: a line *adopted*
    records the version at the alias as the champion. If there is no alias, nothing serves, and the
    alias is set to the version in the log.
    """
    store.check_log(name)
    before: object = None
    deadline = 0.0
    while True:
        audit_log, (aliases, canary) = store.audit_log(name), store.aliases_and_canary(name)
        alias = aliases.get(CHAMPION)
        if alias == audit_log.champion:
            # A process that died before it set the canary's tag leaves an old one behind.
            is_stale = audit_log.lines and canary != audit_log.canary
            return _follow(store, name) if is_stale else audit_log
        if alias is None and store.find(name, audit_log.champion) is None:
            return audit_log  # the champion was deleted, and its alias with it
        if before != (audit_log.last, alias):  # a new disagreement has its own deadline
            before, deadline = (audit_log.last, alias), time.monotonic() + RECONCILE_TIMEOUT_S
        if not audit_log.champion_moves or time.monotonic() >= deadline:
            break
        time.sleep(POLL_INTERVAL_S)
    if alias is None:
        return _follow(store, name)
    log.warning("%s: version %d was made the champion outside Convoy", name, alias)
    _write(
        store,
        name,
        audit_log,
        "adopted",
        alias,
        to=store.find(name, alias),
        details=f"the audit log said version {audit_log.champion}",
        # Without a champion in the log, a roll-back needs the alias's previous version.
        instead_of=None if audit_log.champion_moves else aliases.get(PREVIOUS),
    )
    return store.audit_log(name)


def audit(store: ModelStore, name: str) -> tuple[int, list[str]]:
    """The number of lines in the audit log of ``name``, and a list of faults.

    Faults are missing or unreadable lines, a log that publishing did not make, and aliases or a
    canary that disagree with the log. It does not find a line that an account with write access to
    the registry has rewritten.
    """
    newest = store.newest_line(name)  # first: a line written meanwhile is not a fault
    audit_log = store.audit_log(name)
    aliases, canary = store.aliases_and_canary(name)
    faults = audit_log.faults(newest)
    try:
        store.check_log(name)
    except PromotionRefused as error:
        faults.append(str(error))
    logged = {CHAMPION: audit_log.champion, PREVIOUS: audit_log.previous} if audit_log.last else {}
    existing = {version.version for version, _ in store.versions(name)}
    faults += [
        f"the alias {alias} is at version {aliases.get(alias)}, the audit log says {version}"
        for alias, version in logged.items()
        if aliases.get(alias) != version and (version is None or version in existing)
    ]
    if canary != audit_log.canary:
        faults.append(f"the canary is {canary or 'none'}, the audit log says {audit_log.canary}")
    return len(audit_log.lines), faults


def _reconcile_at(store: ModelStore, name: str, expect_champion: int | None) -> AuditLog:
    audit_log = reconcile(store, name)
    is_gone = expect_champion == NO_CHAMPION and store.find(name, audit_log.champion) is None
    if not is_gone and expect_champion not in (None, audit_log.champion):
        raise PromotionConflict(
            f"{name}: the champion is version {audit_log.champion}, not {expect_champion}"
        )
    return audit_log


def _write(  # noqa: PLR0913 - the fields of a line
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
    """Append a line and apply it.

    Args:
        store: the registry.
        name: the model.
        audit_log: the log as it was when the decision was made.
        action: what was decided.
        version: the number of the version that the line is about.
        to: that version, or None if it no longer exists.
        left: the champion before, if it exists.
        reason: why, in the words of ``by``.
        by: who decided; by default the user of this process.
        details: what the gate or the guard found.
        canary: the canary that the line starts.
        instead_of: the number to record as the champion before; by default the log's champion.

    Raises:
        PromotionConflict: another decision came first.
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
            f"{name}: at the same time another decision came first: {first.action} version "
            f"{first.to_version}, by {first.by}; read the present state, then decide again"
        )
    undone = next((each for each in moves if each.number > line.number), None)
    if entry.move is not None and undone is not None and undone.entry.action == "adopted":
        raise PromotionConflict(
            f"{name}: moving the alias took so long that another process adopted version "
            f"{undone.entry.to_version}, which still served; read the present state, then decide "
            "again"
        )
    return line


def _follow(store: ModelStore, name: str, *, moved: bool = True) -> AuditLog:
    """Note the newest line in the registry, and if a line ``moved`` something, set the aliases.

    Repeats until the audit log has not changed meanwhile, and returns it.
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
    """The user of this process, marked as unverified: users can set ``$LOGNAME`` at will.

    The control plane records the names of tokens, which it has checked. These cannot contain spaces
    or parentheses, so they never look unverified.
    """
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container may run under a uid that has no name
        name = f"uid {os.getuid()}"
    return f"{name} (unverified)"


def _check_text(reason: str | None) -> None:
    if len(reason or "") > MAX_TEXT_CHARS:
        raise UsageError(
            f"the reason has {len(reason or ''):,} characters; at most {MAX_TEXT_CHARS:,} are "
            "allowed"
        )
    try:
        (reason or "").encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the reason is not UTF-8: {error}") from error
