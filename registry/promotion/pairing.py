"""On which held-out pictures two versions can be compared, when their data are not the same.

Pictures are matched by their digests and classes by their names. A picture counts only if neither
version was trained on it. Pure: two opened bundles in, paired scores out.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from registry.core.errors import PromotionRefused
from registry.model.bundle import Bundle
from registry.model.heldout import Heldout, Scores, TrainingRecord

Mask = NDArray[np.bool_]
Numbers = NDArray[np.int64]
Probabilities = NDArray[np.float32]
Labels = tuple[str, ...]

MAX_NAMED = 8
# Of the 64 bits of a difference hash: docs/decisions/0017 has what JPEGs of photographs measured.
MAX_LOOK_BITS = 6
MAX_VIEWED = 512


class Pairs(Struct, frozen=True, kw_only=True):
    """The scores of two versions for the same pictures, row by row.

    Attributes:
        champion: with the labels as the champion numbers them.
        challenger: with the labels as the challenger numbers them.
        positions: int64 (N,), ascending: where each lies among the challenger's held-out pictures.
        class_changes: what clients will see of classes that differ; empty if none does.
        notes: how the data differ, and what was left out.
    """

    champion: Scores
    challenger: Scores
    positions: Numbers
    class_changes: tuple[str, ...]
    notes: tuple[str, ...]


class Side(Struct, frozen=True, kw_only=True):
    """What one version's bundle says of its classes and examples."""

    labels: Labels
    heldout: Heldout
    training: TrainingRecord


class Match(Struct, frozen=True, kw_only=True):
    """Two versions' records beside each other.

    Attributes:
        rows: int64 (N,): of each picture that the challenger held out, its row in the champion's
            record; -1 if the champion did not hold it out.
        to_new: int64 (classes of the champion,): the challenger's number of each class, or -1.
        to_old: int64 (classes of the challenger,): the champion's number of each class, or -1.
    """

    old: Side
    new: Side
    rows: Numbers
    to_new: Numbers
    to_old: Numbers

    @property
    def both(self) -> Mask:
        """bool (N,), as the others: which pictures both versions held out."""
        return self.rows >= 0

    @property
    def relabelled(self) -> Mask:
        """Which lie under another class now."""
        before = self.to_new[self.old.heldout.labels[self.rows]]
        changed: Mask = self.both & (before != self.new.heldout.labels)
        return changed

    @property
    def champion_trained(self) -> Mask:
        return np.isin(self.new.heldout.short_digests, self.old.training.digests)

    @property
    def challenger_trained(self) -> Mask:
        return np.isin(self.new.heldout.short_digests, self.new.training.digests)

    @property
    def usable(self) -> Mask:
        """Which are of a class that both know, under the same label, and trained neither."""
        shared = self.to_old[self.new.heldout.labels] >= 0
        return shared & ~self.relabelled & ~self.champion_trained & ~self.challenger_trained


def pair_heldout(champion: Bundle, challenger: Bundle, min_examples: int) -> Pairs:
    """The pictures on which both versions can be compared, with their scores.

    Those that both held out, if there are enough: ``min_examples``, or half of what the champion
    held out where that is less. If they are too few, or of some class there is none, all that the
    challenger held out, as far as publishing has scored this champion on them.

    Raises:
        PromotionRefused: too few pictures, or a record contains NaN or infinite probabilities.
        BundleInvalid: a record is missing or damaged.
    """
    match = _match(_side(champion), _side(challenger))
    heldout, notes = match.new.heldout, _notes(match)
    shape = len(heldout.labels), len(match.old.labels)
    scores = challenger.champion_scores(champion.manifest_sha256, shape)
    chosen, probabilities = _choose(match, scores, min_examples, notes)
    labels = heldout.labels[chosen]
    notes += _not_compared(match, labels)
    return Pairs(
        champion=_finite(Scores(match.to_old[labels], probabilities), "champion"),
        challenger=_finite(Scores(labels, heldout.probabilities[chosen]), "challenger"),
        positions=np.flatnonzero(chosen),
        class_changes=describe_classes(match.old.labels, match.new.labels, match.to_new),
        notes=tuple(notes),
    )


def describe_classes(old: Labels, new: Labels, to_new: Numbers | None = None) -> tuple[str, ...]:
    """What clients will see when ``new`` labels replace ``old`` ones; empty if they are the same.

    Args:
        old: the labels until now.
        new: the labels from then on.
        to_new: for each old class the number that it gets, or -1; by default classes of the same
            name are the same.
    """
    to_new = _by_name(old, new) if to_new is None else to_new
    kept = [(index, int(to_new[index])) for index in range(len(old)) if to_new[index] >= 0]
    renamed = [f"{old[a]!r} → {new[b]!r}" for a, b in kept if old[a] != new[b]]
    moved = [f"{new[b]!r} {a} → {b}" for a, b in kept if a != b]
    added = [repr(new[b]) for b in sorted(set(range(len(new))) - {b for _, b in kept})]
    gone = [repr(old[a]) for a in np.flatnonzero(to_new < 0)]
    changes = {
        "labels that appear": added,
        "labels that disappear": gone,
        "labels that are renamed": renamed,
        "indices that change": moved,
    }
    return tuple(f"{what}: {_listed(names)}" for what, names in changes.items() if names)


def _side(bundle: Bundle) -> Side:
    return Side(labels=bundle.manifest.labels, heldout=bundle.heldout(), training=bundle.training())


def _match(old: Side, new: Side) -> Match:
    rows = _find(old.heldout, new.heldout)
    to_new = _by_name(old.labels, new.labels)
    both = rows >= 0
    _add_renamed(to_new, old.heldout.labels[rows[both]], new.heldout.labels[both], len(new.labels))
    to_old = np.full(len(new.labels), -1)
    to_old[to_new[to_new >= 0]] = np.flatnonzero(to_new >= 0)
    return Match(old=old, new=new, rows=rows, to_new=to_new, to_old=to_old)


def _find(old: Heldout, new: Heldout) -> Numbers:
    """The row in ``old`` of each picture of ``new``; -1 for one that is not there."""
    order = np.argsort(old.short_digests)
    places = np.searchsorted(old.short_digests[order], new.short_digests)
    rows = order[np.minimum(places, len(order) - 1)]
    return np.where((old.digests[rows] == new.digests).all(axis=1), rows, -1)


def _by_name(old: Labels, new: Labels) -> Numbers:
    numbers = {label: index for index, label in enumerate(new)}
    return np.array([numbers.get(label, -1) for label in old])


def _add_renamed(to_new: Numbers, before: Numbers, after: Numbers, classes: int) -> None:
    """Note in ``to_new`` the classes that most of whose pictures lie under one new name now."""
    free = set(range(classes)) - set(to_new.tolist())
    for index in np.flatnonzero(to_new < 0):
        moved = after[before == index]
        if not len(moved):
            continue
        target = int(np.bincount(moved).argmax())
        if target in free and 2 * (moved == target).sum() > len(moved):
            to_new[index] = target
            free.remove(target)


def _choose(
    match: Match, scores: Probabilities | None, min_examples: int, notes: list[str]
) -> tuple[Mask, Probabilities]:
    """Which of the challenger's held-out pictures decide, and what the champion says of these.

    Args:
        match: the two records.
        scores: of the champion for all that the challenger held out, if publishing has them.
        min_examples: of the policy.
        notes: what is unusual about the choice is appended.
    """
    usable, labels, old = match.usable, match.new.heldout.labels, match.old.heldout
    common = usable & match.both
    needed = min(min_examples, (len(old.labels) + 1) // 2)
    few, absent = common.sum() < needed, np.setdiff1d(labels[usable], labels[common]).tolist()
    if few:
        notes.append(f"only {_pictures(common)} that both held out, {needed:,} are needed")
    if absent:
        names = _listed([repr(match.new.labels[index]) for index in absent])
        notes.append(f"no picture that both held out is of class {names}")
    if not few and (scores is None or not absent):
        return common, old.probabilities[match.rows[common]]
    if scores is None or usable.sum() < needed:
        raise PromotionRefused(_why_not(match, notes, is_scored=scores is not None))
    notes.append(
        "judged on all that the challenger held out; publishing has scored the champion on them"
    )
    return usable, scores[usable]


def _not_compared(match: Match, compared: Numbers) -> list[str]:
    """Name the classes of both that a version held out, and of which no picture is compared."""
    held_out = np.union1d(match.to_new[match.old.heldout.labels], match.new.heldout.labels)
    shared = np.flatnonzero(match.to_old >= 0)
    missing = np.setdiff1d(np.intersect1d(shared, held_out), compared).tolist()
    names = _listed([repr(match.new.labels[index]) for index in missing])
    return [f"NOT compared, as no picture of it can be used: class {names}"] if missing else []


def _notes(match: Match) -> list[str]:
    """How the data of the two differ, as sentences; none if they do not."""
    relabelled, seen = match.relabelled, match.champion_trained
    own = match.challenger_trained & ~seen
    notes = _changed_pictures(match)
    if relabelled.any():
        before = match.old.heldout.labels[match.rows[relabelled]]
        after = match.new.heldout.labels[relabelled]
        pairs = Counter(zip(before.tolist(), after.tolist(), strict=True)).most_common()
        moves = [f"{match.old.labels[a]} → {match.new.labels[b]}: {n}" for (a, b), n in pairs]
        notes.append(f"{_pictures(relabelled)} left out: re-labelled ({_listed(moves)})")
    for trained, who in ((seen, "champion"), (own, "challenger")):
        if trained.any():
            notes.append(f"{_pictures(trained)} left out: in the training data of the {who}")
    if added := np.flatnonzero(match.to_old < 0).tolist():
        heldout, unseen = match.new.heldout, ~match.challenger_trained
        figures = []
        for index in added:
            right = heldout.right[unseen & (heldout.labels == index)]
            figures.append(f"{match.new.labels[index]!r} {right.sum():,} of {len(right):,}")
        notes.append(f"new classes, right on held-out pictures: {_listed(figures)}")
    return notes


def _changed_pictures(match: Match) -> list[str]:
    """Which held-out pictures came and went since the champion."""
    old, new = match.old.heldout, match.new.heldout
    kept = np.isin(old.short_digests, new.short_digests)  # copies too, which have one row
    trains_now = np.isin(old.short_digests, match.new.training.digests) & ~kept
    gone = ~kept & ~trains_now
    added = ~match.both & ~match.champion_trained
    if kept.all() and not added.any():
        return []
    counts = [
        f"the champion held out {len(old.labels):,} pictures, the challenger {len(new.labels):,}: "
        f"{match.both.sum():,} in common, {added.sum():,} new",
    ]
    if trains_now.any():
        counts.append(f"{trains_now.sum():,} train the challenger now")
    if gone.any():
        counts.append(f"{gone.sum():,} removed")
        if alike := _alike(old.perceptual_hashes[gone][:MAX_VIEWED], _new_hashes(match)):
            counts[-1] += f", {alike:,} of them re-encoded with loss by the look of new pictures"
    return [", ".join(counts)]


def _new_hashes(match: Match) -> NDArray[np.uint64]:
    """The difference hashes of the challenger's pictures that the champion did not know."""
    known = np.concatenate([match.old.training.digests, match.old.heldout.short_digests])
    heldout, training = match.new.heldout, match.new.training
    return np.concatenate(
        [
            heldout.perceptual_hashes[~np.isin(heldout.short_digests, known)],
            training.perceptual_hashes[~np.isin(training.digests, known)],
        ]
    )


def _alike(perceptual_hashes: NDArray[np.uint64], others: NDArray[np.uint64]) -> int:
    """How many of ``perceptual_hashes`` are close to one of ``others``."""
    if not len(others):
        return 0
    return sum(
        bool(np.bitwise_count(others ^ each).min() <= MAX_LOOK_BITS) for each in perceptual_hashes
    )


def _why_not(match: Match, notes: Sequence[str], *, is_scored: bool) -> str:
    old, new = match.old.heldout, match.new.heldout
    scored = (
        f"publishing has scored the champion on {_pictures(match.usable)} that can be used"
        if is_scored
        else "the challenger was published beside another champion or none"
    )
    return (
        f"the two cannot be compared: {'; '.join(notes)}; {scored}. Each on its own held-out "
        f"pictures: champion {old.accuracy:.4f} of {len(old.labels):,}, challenger "
        f"{new.accuracy:.4f} of {len(new.labels):,}. Train the challenger again, so that "
        "publishing scores the present champion, or lower min_examples in the policy, or use "
        "--force with a reason"
    )


def _finite(scores: Scores, who: str) -> Scores:
    if not np.isfinite(scores.probabilities).all():
        raise PromotionRefused(
            f"the held-out record of the {who} contains NaN or infinite probabilities; publish "
            "that version again"
        )
    return scores


def _pictures(which: Mask) -> str:
    count = int(which.sum())
    return f"{count:,} picture{'' if count == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
