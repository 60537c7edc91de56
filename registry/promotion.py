"""Promote and roll back: the gate asked, the decision written into the ledger, the aliases moved.

In that order. The ledger decides between people who do so at once (``registry.ledger``), and the
aliases follow it: whoever wrote a line points them at what the whole ledger says, and looks again.
So after the last of any number of racing promotions, aliases and ledger agree.
"""

import getpass
import logging
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from registry.bundle import HELDOUT, Bundle
from registry.contract import CHAMPION, ModelRef, ModelVersion
from registry.errors import (
    BundleInvalid,
    PromotionConflict,
    PromotionRefused,
    UsageError,
    VersionNotFound,
)
from registry.gates import Latency, Policy, compare
from registry.ledger import Action, Entry, Ledger, Line
from registry.store import ModelStore

log = logging.getLogger(__name__)

TimeBoth = Callable[[Bundle, Bundle], Latency]
"""Times the forward passes of the champion's and the challenger's bundle."""

# Between its line and its alias a promotion needs two calls of the registry.
SETTLE_S = 5.0
LOOK_S = 0.25


def promote(
    store: ModelStore,
    name: str,
    version: int,
    *,
    expect_champion: int | None = None,
    force: bool = False,
    reason: str | None = None,
    policy: Policy | None = None,
    time_both: TimeBoth | None = None,
) -> Line:
    """Make ``version`` the champion of ``name`` if the gate lets it.

    Args:
        store: the registry.
        name: the model.
        version: the challenger's number.
        expect_champion: the version that must be the champion; by default the one that the gate
            compares with.
        force: promote whatever the gate says; then ``reason`` is needed and recorded.
        reason: why, for the record.
        policy: what the challenger may lose.
        time_both: without it, forward passes are not compared.

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
    challenger = store.resolve(ModelRef(name, version))
    ledger = settle(store, name)
    if expect_champion is not None and ledger.champion != expect_champion:
        raise PromotionConflict(
            f"{name}: the champion is version {ledger.champion}, not {expect_champion}"
        )
    if ledger.champion == version:
        raise PromotionRefused(f"{name} version {version} is the champion already")
    champion = _find(store, name, ledger.champion)
    accepted, verdict = _judge(store, champion, challenger, policy, time_both)
    if champion is None and ledger.champion is not None:
        verdict += f" (version {ledger.champion}, the champion, is gone from the registry)"
    action: Action = "promoted" if accepted else "forced" if force else "refused"
    line = _write(
        store,
        name,
        ledger,
        _entry(action, ledger, challenger, reason, verdict, champion),
    )
    if action == "refused":
        raise PromotionRefused(f"{name} version {version} is refused: {verdict}")
    return line


def roll_back(store: ModelStore, name: str, reason: str | None = None) -> Line:
    """Make the previous champion champion again, without a gate.

    The version that is left becomes ``previous``, so a roll-back by mistake is undone by another.

    Raises:
        VersionNotFound: there is nothing to go back to.
        PromotionConflict: somebody else moved the champion meanwhile.
    """
    ledger = settle(store, name)
    if ledger.previous is None:
        raise VersionNotFound(f"{name} has no previous champion to roll back to")
    back = store.resolve(ModelRef(name, ledger.previous))
    left = _find(store, name, ledger.champion)
    return _write(store, name, ledger, _entry("rolled back", ledger, back, reason, None, left))


def settle(store: ModelStore, name: str) -> Ledger:
    """The ledger of ``name``, once the champion's alias agrees with it.

    Where it does not, somebody is promoting at this moment, so it is waited for. If it stays so,
    the alias was moved by other means, or who promoted died before moving it: what serves is then
    written down as *adopted*, so that the ledger says what is.
    """
    deadline = time.monotonic() + SETTLE_S
    while True:
        ledger, alias = store.ledger(name), store.aliases(name).get(CHAMPION)
        if alias is None or alias == ledger.champion:
            return ledger
        if not ledger.moves or time.monotonic() > deadline:
            break
        time.sleep(LOOK_S)
    log.warning("%s: version %d was made the champion by other means", name, alias)
    adopted = store.resolve(ModelRef(name, alias))
    verdict = f"the ledger said version {ledger.champion}"
    _write(store, name, ledger, _entry("adopted", ledger, adopted, None, verdict))
    return store.ledger(name)


def _write(store: ModelStore, name: str, ledger: Ledger, entry: Entry) -> Line:
    """Append ``entry`` and carry it out; ``PromotionConflict`` if another move came first."""
    number = store.append(name, ledger.continued(entry))
    after = store.ledger(name)
    line = after.find(number)
    assert line is not None
    if not line.stands:
        first = after.moves[len(ledger.moves)].entry
        raise PromotionConflict(
            f"{name}: {first.by} {first.action} version {first.to_version} at the same time, and "
            "came first; look again, then decide"
        )
    while line.entry.move is not None:
        store.point(name, champion=after.champion, previous=after.previous)
        seen, after = after, store.ledger(name)
        if after.champion == seen.champion:
            break
    return line


def _entry(
    action: Action,
    ledger: Ledger,
    to: ModelVersion,
    reason: str | None,
    verdict: str | None,
    left: ModelVersion | None = None,
) -> Entry:
    return Entry(
        action=action,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        by=getpass.getuser(),
        from_version=ledger.champion,
        to_version=to.version,
        from_manifest_sha256=left.manifest_sha256 if left else None,
        to_manifest_sha256=to.manifest_sha256,
        reason=reason,
        verdict=verdict,
    )


def _find(store: ModelStore, name: str, version: int | None) -> ModelVersion | None:
    """The version, or None when there is no such number or it was deleted."""
    if version is None:
        return None
    try:
        return store.resolve(ModelRef(name, version))
    except VersionNotFound:
        return None


def _judge(
    store: ModelStore,
    champion: ModelVersion | None,
    challenger: ModelVersion,
    policy: Policy | None,
    time_both: TimeBoth | None,
) -> tuple[bool, str]:
    """Whether the gate lets ``challenger`` pass, and why; what cannot be read does not pass."""
    try:
        with tempfile.TemporaryDirectory(prefix="convoy-gate-") as name:
            ours = store.download(challenger, Path(name) / "challenger")
            if champion is None:
                return True, "there was no champion to compare with"
            folder = Path(name) / "champion"
            if time_both is None:
                theirs = store.download(champion, folder, lambda _: [HELDOUT])
                verdict = compare(theirs, ours, policy)
            else:
                theirs = store.download(champion, folder)
                verdict = compare(theirs, ours, policy, time_both(theirs, ours))
            return verdict.accepted, str(verdict)
    except (PromotionRefused, BundleInvalid) as error:
        return False, str(error)
