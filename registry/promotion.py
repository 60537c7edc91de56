"""Promote and roll back: the gate asked, the aliases moved, the decision written down."""

import getpass
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from registry.bundle import HELDOUT
from registry.contract import CHAMPION, PREVIOUS, ModelRef, ModelVersion
from registry.errors import BundleInvalid, PromotionRefused, UsageError, VersionNotFound
from registry.gates import Verdict, compare
from registry.store import Decision, ModelStore


def promote(
    store: ModelStore, name: str, version: int, *, force: bool = False, reason: str | None = None
) -> Decision:
    """Make ``version`` the champion of ``name`` if the gate finds it no worse than the present one.

    Args:
        store: the registry.
        name: the model.
        version: the challenger's number.
        force: promote whatever the gate says; then ``reason`` is needed and recorded.
        reason: why, for the record.

    Returns:
        The decision as it was recorded, with the gate's verdict or objection as text.

    Raises:
        PromotionRefused: the gate says no; the refusal is recorded.
        VersionNotFound: no such version.
        UsageError: ``force`` without a reason.
    """
    if force and not (reason or "").strip():
        raise UsageError("--force needs --reason: it is recorded with the decision")
    challenger = store.resolve(ModelRef(name, version))
    champion = _champion(store, name)
    if champion is not None and champion.version == version:
        raise PromotionRefused(f"{name} version {version} is the champion already")
    finding, objection = "there was no champion to compare with", None
    try:
        verdict = _judge(store, champion, challenger)
        if verdict is not None:
            finding = str(verdict)
        if verdict is not None and not verdict.accepted:
            objection = f"worse than the champion: {verdict}"
    except (PromotionRefused, BundleInvalid) as error:
        objection = str(error)
    action = "promoted" if objection is None else "forced" if force else "refused"
    decision = _record(
        store,
        name,
        action=action,
        from_version=champion.version if champion else None,
        to_version=version,
        reason=reason,
        verdict=objection or finding,
    )
    if action == "refused":
        raise PromotionRefused(f"{name} version {version} is refused: {objection}")
    store.set_champion(name, version)
    return decision


def roll_back(store: ModelStore, name: str, reason: str | None = None) -> tuple[int, int]:
    """Make ``previous`` the champion again, without a gate.

    The version that is left becomes ``previous``, so a roll-back by mistake is undone by another.

    Returns:
        (version left, version that now serves).

    Raises:
        VersionNotFound: there is nothing to go back to.
    """
    aliases = store.aliases(name)
    if CHAMPION not in aliases or PREVIOUS not in aliases:
        raise VersionNotFound(f"{name} has no previous champion to roll back to")
    left, back = aliases[CHAMPION], aliases[PREVIOUS]
    _record(store, name, action="rolled back", from_version=left, to_version=back, reason=reason)
    store.set_champion(name, back)
    return left, back


def _record(
    store: ModelStore,
    name: str,
    *,
    action: str,
    from_version: int | None,
    to_version: int,
    reason: str | None,
    verdict: str | None = None,
) -> Decision:
    """Write a decision down, with who and when, before it is carried out."""
    decision = Decision(
        action=action,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        by=getpass.getuser(),
        from_version=from_version,
        to_version=to_version,
        reason=reason,
        verdict=verdict,
    )
    store.record(name, decision, key=time.time_ns())
    return decision


def _champion(store: ModelStore, name: str) -> ModelVersion | None:
    if CHAMPION not in store.aliases(name):
        return None
    return store.resolve(ModelRef(name, alias=CHAMPION))


def _judge(
    store: ModelStore, champion: ModelVersion | None, challenger: ModelVersion
) -> Verdict | None:
    """The comparison, on bundles fetched for it; a challenger that cannot be read is refused."""
    with tempfile.TemporaryDirectory(prefix="convoy-gate-") as name:
        ours = store.download(challenger, Path(name) / "challenger")
        if champion is None:
            return None
        theirs = store.download(champion, Path(name) / "champion", lambda _: [HELDOUT])
        return compare(theirs, ours)
