"""Decisions: writes each to the audit log, and then moves the aliases after it.

The order matters. If several operators decide at once, the audit log says whose decision stands
(``registry.store.audit_log``), and the aliases follow the log: after a process has written a line,
it sets the aliases to what all lines together say, and reads the log again. So when the last of
several concurrent decisions has ended, the aliases agree with the log.
"""

import getpass
import logging
import os
import secrets
import time
from datetime import UTC, datetime

from msgspec import Struct

from registry.core.errors import PromotionConflict, PromotionRefused, UsageError
from registry.model.refs import CHAMPION, PREVIOUS, Canary, ModelVersion
from registry.store.audit_log import MAX_TEXT_CHARS, Action, AuditLog, Entry, Line
from registry.store.mlflow_store import ModelStore

log = logging.getLogger(__name__)

# Between its line and its alias a promotion calls the registry a few times. Each call may take
# MLflow's time-out, 10 s, and is retried.
RECONCILE_TIMEOUT_S = 25.0
POLL_INTERVAL_S = 0.25
# As ``expect_champion``: the caller expects no champion, or that its version was deleted.
NO_CHAMPION = 0


class Decision(Struct, frozen=True, kw_only=True):
    """What was decided about one version of a model.

    Attributes:
        action: what was decided.
        version: the number of the version.
        to: that version, or None if it no longer exists.
        left: the champion before, if it exists.
        reason: why, in the words of ``by``.
        by: who decided; by default the user of this process.
        details: what the gate or the guard found.
        canary: the canary that the decision starts.
        instead_of: the number to record as the champion before; by default the log's champion.
    """

    action: Action
    version: int
    to: ModelVersion | None
    left: ModelVersion | None = None
    reason: str | None = None
    by: str | None = None
    details: str | None = None
    canary: Canary | None = None
    instead_of: int | None = None


def carry_out(store: ModelStore, name: str, audit_log: AuditLog, decision: Decision) -> Line:
    """Append the ``decision`` to the log of the model ``name``, and move the aliases.

    Args:
        store: the registry.
        name: the model.
        audit_log: the log as it was when the decision was made.
        decision: what was decided.

    Raises:
        PromotionConflict: another decision came first.
    """
    to, left, before = decision.to, decision.left, decision.instead_of
    entry = audit_log.continued(
        Entry(
            action=decision.action,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            by=decision.by or _user(),
            from_version=audit_log.champion if before is None else before,
            to_version=decision.version,
            from_manifest_sha256=left.manifest_sha256 if left else None,
            to_manifest_sha256=to.manifest_sha256 if to else None,
            reason=decision.reason,
            details=decision.details,
            canary=decision.canary,
            nonce=secrets.token_hex(8),
        )
    )
    store.audit_logs.append(name, entry)
    return _standing_line(_follow(store, name, moved=entry.move is not None), name, entry)


def _standing_line(after: AuditLog, name: str, entry: Entry) -> Line:
    """The line of ``entry`` in the log ``after`` it was written.

    Raises:
        PromotionConflict: the line does not stand, or was undone before the alias moved.
    """
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


def reconcile(store: ModelStore, name: str) -> AuditLog:
    """The audit log of ``name``, once the champion's alias agrees with it.

    If the two disagree, another process may be between its line and its alias, so this waits for up
    to ``RECONCILE_TIMEOUT_S``. If they still disagree, the alias was moved outside Convoy, or a
    promoting process died before it moved the alias. What serves counts then: a line *adopted*
    records the version at the alias as the champion. If there is no alias, nothing serves, and the
    alias is set to the version in the log.
    """
    store.names.check_log(name)
    before: object = None
    deadline = 0.0
    while True:
        audit_log = store.audit_logs.read(name)
        aliases, canary = store.aliases.read_with_canary(name)
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
    adopted = Decision(
        action="adopted",
        version=alias,
        to=store.find(name, alias),
        details=f"the audit log said version {audit_log.champion}",
        # Without a champion in the log, a roll-back needs the alias's previous version.
        instead_of=None if audit_log.champion_moves else aliases.get(PREVIOUS),
    )
    carry_out(store, name, audit_log, adopted)
    return store.audit_logs.read(name)


def reconcile_at(store: ModelStore, name: str, expect_champion: int | None) -> AuditLog:
    """As ``reconcile``, if the champion is ``expect_champion``; None stands for any.

    Raises:
        PromotionConflict: it is another version.
    """
    audit_log = reconcile(store, name)
    is_gone = expect_champion == NO_CHAMPION and store.find(name, audit_log.champion) is None
    if not is_gone and expect_champion not in (None, audit_log.champion):
        raise PromotionConflict(
            f"{name}: the champion is version {audit_log.champion}, not {expect_champion}"
        )
    return audit_log


def audit(store: ModelStore, name: str) -> tuple[int, list[str]]:
    """The number of lines in the audit log of ``name``, and a list of faults.

    Faults are missing or unreadable lines, a log that publishing did not make, and aliases or a
    canary that disagree with the log. It does not find a line that an account with write access to
    the registry has rewritten.
    """
    newest = store.audit_logs.newest_line(name)  # first: a line written meanwhile is not a fault
    audit_log = store.audit_logs.read(name)
    aliases, canary = store.aliases.read_with_canary(name)
    faults = audit_log.faults(newest)
    try:
        store.names.check_log(name)
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


def check_reason(reason: str | None) -> None:
    """Check a reason before the work for which it is given.

    Raises:
        UsageError: it is too long, or not UTF-8.
    """
    if len(reason or "") > MAX_TEXT_CHARS:
        raise UsageError(
            f"the reason has {len(reason or ''):,} characters; at most {MAX_TEXT_CHARS:,} are "
            "allowed"
        )
    try:
        (reason or "").encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the reason is not UTF-8: {error}") from error


def _follow(store: ModelStore, name: str, *, moved: bool = True) -> AuditLog:
    """Note the newest line in the registry, and if a line ``moved`` something, set the aliases.

    Repeats until the audit log has not changed meanwhile, and returns it.
    """
    audit_log = store.audit_logs.read(name)
    while True:
        store.audit_logs.note_newest(name, audit_log)
        if moved:
            store.aliases.set_champion(
                name,
                champion=audit_log.champion,
                previous=audit_log.previous,
                canary=audit_log.canary,
            )
        seen, audit_log = audit_log.last, store.audit_logs.read(name)
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
