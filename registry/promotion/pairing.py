"""Finds the held-out pictures on which two versions can be compared when their data differ.

Pictures are matched by their digests, and classes by their names. A picture counts only if neither
version was trained on it. Pure: it takes two opened bundles and returns paired scores.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from registry.core.errors import PromotionRefused
from registry.model.bundle import HELDOUT, Bundle
from registry.model.heldout import Heldout, Scores, TrainingRecord

Mask = NDArray[np.bool_]
Numbers = NDArray[np.int64]
Probabilities = NDArray[np.float32]
Labels = tuple[str, ...]

MAX_NAMED = 8
# Two pictures are alike if at most this many of the 64 bits of their difference hashes differ;
# docs/decisions/0017 has the measurement on JPEGs of photographs.
MAX_DIFFERENT_BITS = 6
MAX_HASHES = 512


class Pairs(Struct, frozen=True, kw_only=True):
    """The scores of two versions for the same pictures, row by row.

    Attributes:
        champion: with the labels as the champion numbers them.
        challenger: with the labels as the challenger numbers them.
        positions: int64 (N,), ascending: their places among the challenger's held-out pictures.
        class_changes: how the classes differ for clients; empty if they do not.
        notes: how the data differ, and what was left out.
    """

    champion: Scores
    challenger: Scores
    positions: Numbers
    class_changes: tuple[str, ...]
    notes: tuple[str, ...]


class Side(Struct, frozen=True, kw_only=True):
    """The classes of one version and the records of its examples, from its bundle."""

    labels: Labels
    heldout: Heldout
    training: TrainingRecord


class Match(Struct, frozen=True, kw_only=True):
    """How the records of the champion (``old``) and of the challenger (``new``) correspond.

    N is the number of pictures that the challenger held out.

    Attributes:
        rows: int64 (N,): the row of each picture in the champion's record; -1 if the champion did
            not hold it out.
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
        """The pictures that both versions held out: bool (N,), like the other masks."""
        return self.rows >= 0

    @property
    def relabelled(self) -> Mask:
        """The pictures whose class changed between the two records."""
        before = self.to_new[self.old.heldout.labels[self.rows]]
        changed: Mask = self.both & (before != self.new.heldout.labels)
        return changed

    @property
    def champion_trained(self) -> Mask:
        """The pictures that trained the champion, by the first 64 bits of their digests."""
        return np.isin(self.new.heldout.short_digests, self.old.training.digests)

    @property
    def challenger_trained(self) -> Mask:
        """The pictures that trained the challenger, found in the same way."""
        return np.isin(self.new.heldout.short_digests, self.new.training.digests)

    @property
    def usable(self) -> Mask:
        """The pictures of a shared class that kept their class and did not train either version."""
        shared = self.to_old[self.new.heldout.labels] >= 0
        return shared & ~self.relabelled & ~self.champion_trained & ~self.challenger_trained


def pair_heldout(champion: Bundle, challenger: Bundle, min_examples: int) -> Pairs:
    """The pictures on which both versions can be compared, with their scores.

    These are the pictures that both versions held out, if there are enough of them:
    ``min_examples``, or half of what the champion held out if that is less. If there are too few,
    or a class has none, it takes all pictures that the challenger held out, provided that
    publishing has scored this champion on them.

    Raises:
        PromotionRefused: there are too few pictures, or a record contains NaN or infinite
            probabilities.
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
        old: the present labels.
        new: the labels that replace them.
        to_new: the new number of each old class, or -1; by default, classes are matched by name.
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
    if HELDOUT not in bundle.manifest.files:
        raise PromotionRefused(
            "a version was imported without labelled examples, so nothing says how accurate it is; "
            "score it on a folder with one folder for each label: "
            f"convoy evaluate {bundle.manifest.model} VERSION --data FOLDER"
        )
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
    """The row in ``old`` of each picture of ``new``; -1 if it is not in ``old``."""
    order = np.argsort(old.short_digests)
    places = np.searchsorted(old.short_digests[order], new.short_digests)
    rows = order[np.minimum(places, len(order) - 1)]
    return np.where((old.digests[rows] == new.digests).all(axis=1), rows, -1)


def _by_name(old: Labels, new: Labels) -> Numbers:
    numbers = {label: index for index, label in enumerate(new)}
    return np.array([numbers.get(label, -1) for label in old])


def _add_renamed(to_new: Numbers, before: Numbers, after: Numbers, classes: int) -> None:
    """Add to ``to_new`` the classes most of whose pictures now have one and the same new label."""
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
    """The challenger's held-out pictures to compare on, and the champion's probabilities for them.

    Args:
        match: the two records.
        scores: the champion's probabilities for all pictures that the challenger held out, if
            publishing has recorded them.
        min_examples: the policy's minimum.
        notes: this function appends what is unusual about the choice.
    """
    usable, labels, old = match.usable, match.new.heldout.labels, match.old.heldout
    common = usable & match.both
    needed = min(min_examples, (len(old.labels) + 1) // 2)
    few, absent = common.sum() < needed, np.setdiff1d(labels[usable], labels[common]).tolist()
    if few:
        notes.append(f"both held out only {_pictures(common)}, {needed:,} are needed")
    if absent:
        names = _listed([repr(match.new.labels[index]) for index in absent])
        notes.append(f"both held out no picture of class {names}")
    if not few and (scores is None or not absent):
        return common, old.probabilities[match.rows[common]]
    if scores is None or usable.sum() < needed:
        raise PromotionRefused(_why_not(match, notes, is_scored=scores is not None))
    notes.append(
        "compared on all pictures that the challenger held out; publishing has scored the champion "
        "on them"
    )
    return usable, scores[usable]


def _not_compared(match: Match, compared: Numbers) -> list[str]:
    """A note that names the shared held-out classes of which no picture is compared."""
    held_out = np.union1d(match.to_new[match.old.heldout.labels], match.new.heldout.labels)
    shared = np.flatnonzero(match.to_old >= 0)
    missing = np.setdiff1d(np.intersect1d(shared, held_out), compared).tolist()
    names = _listed([repr(match.new.labels[index]) for index in missing])
    return (
        [f"NOT compared, because none of its pictures can be used: class {names}"]
        if missing
        else []
    )


def _notes(match: Match) -> list[str]:
    """Sentences that say how the data of the two differ; empty if they do not."""
    relabelled, seen = match.relabelled, match.champion_trained
    own = match.challenger_trained & ~seen
    notes = _changed_pictures(match)
    if relabelled.any():
        before = match.old.heldout.labels[match.rows[relabelled]]
        after = match.new.heldout.labels[relabelled]
        pairs = Counter(zip(before.tolist(), after.tolist(), strict=True)).most_common()
        moves = [f"{match.old.labels[a]} → {match.new.labels[b]}: {n}" for (a, b), n in pairs]
        notes.append(f"{_pictures(relabelled)} left out: re-labelled ({_listed(moves)})")
    for trained, role in ((seen, "champion"), (own, "challenger")):
        if trained.any():
            notes.append(f"{_pictures(trained)} left out: in the training data of the {role}")
    if added := np.flatnonzero(match.to_old < 0).tolist():
        heldout, unseen = match.new.heldout, ~match.challenger_trained
        figures = []
        for index in added:
            right = heldout.right[unseen & (heldout.labels == index)]
            figures.append(f"{match.new.labels[index]!r} {right.sum():,} of {len(right):,}")
        notes.append(f"new classes, right on held-out pictures: {_listed(figures)}")
    return notes


def _changed_pictures(match: Match) -> list[str]:
    """A note on the held-out pictures that are new or gone since the champion."""
    old, new = match.old.heldout, match.new.heldout
    kept = np.isin(
        old.short_digests, new.short_digests
    )  # by digest: two copies of a picture have only one row
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
        counts.append(f"{trains_now.sum():,} are now in the training data of the challenger")
    if gone.any():
        counts.append(f"{gone.sum():,} removed")
        if alike := _alike(old.perceptual_hashes[gone][:MAX_HASHES], _new_hashes(match)):
            counts[-1] += f", {alike:,} of them probably re-encoded: new pictures look alike"
    return [", ".join(counts)]


def _new_hashes(match: Match) -> NDArray[np.uint64]:
    """The difference hashes of the challenger's pictures that are not in the champion's records."""
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
        bool(np.bitwise_count(others ^ each).min() <= MAX_DIFFERENT_BITS)
        for each in perceptual_hashes
    )


def _why_not(match: Match, notes: Sequence[str], *, is_scored: bool) -> str:
    old, new = match.old.heldout, match.new.heldout
    scored = (
        f"publishing has scored the champion on {_pictures(match.usable)} that can be used"
        if is_scored
        else "the challenger was published when another version or none was champion"
    )
    return (
        f"the two cannot be compared: {'; '.join(notes)}; {scored}. Accuracy of each on its own "
        f"held-out pictures: champion {old.accuracy:.4f} of {len(old.labels):,}, challenger "
        f"{new.accuracy:.4f} of {len(new.labels):,}. Train the challenger again, so that "
        "publishing scores the present champion, or lower min_examples in the policy, or use "
        "--force with a reason"
    )


def _finite(scores: Scores, role: str) -> Scores:
    if not np.isfinite(scores.probabilities).all():
        raise PromotionRefused(
            f"the held-out record of the {role} contains NaN or infinite probabilities; publish "
            "that version again"
        )
    return scores


def _pictures(which: Mask) -> str:
    count = int(which.sum())
    return f"{count:,} picture{'' if count == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
