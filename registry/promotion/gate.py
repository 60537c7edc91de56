"""The gate: compares a challenger with the champion on the same held-out pictures.

Pure: it takes two opened bundles and a policy, and returns a comparison.
``registry.promotion.pairing`` finds the pictures, and ``registry.promotion.promotion`` acts on the
result.
"""

import numpy as np
from msgspec import Struct
from scipy.special import bdtr

from registry.model.bundle import Bundle
from registry.model.heldout import Scores
from registry.promotion.latency_comparison import LatencyComparison
from registry.promotion.pairing import Labels, Pairs, pair_heldout
from registry.promotion.policy import Policy

Z_95 = 1.959964  # 95 % of a normal distribution lie within this many standard deviations


class Check(Struct, frozen=True, kw_only=True):
    """One check of the gate: a figure of both versions, the allowed loss, and the outcome."""

    what: str
    champion: float
    challenger: float
    allowed: str
    passed: bool
    note: str = ""


class GateComparison(Struct, frozen=True, kw_only=True):
    """The comparison of a challenger with the champion.

    ``gained`` has the pictures that only the challenger gets right, ``lost`` those that only the
    champion gets right, each as positions among the challenger's held-out pictures. ``p_value`` is
    McNemar's exact two-sided one: how likely such a split would be if both versions were equally
    good (McNemar 1947). ``class_changes`` lists what clients will see if the classes differ.
    ``notes`` list how the data differ, and what could not be compared.
    """

    examples: int
    champion_accuracy: float
    challenger_accuracy: float
    gained: tuple[int, ...]
    lost: tuple[int, ...]
    p_value: float
    checks: tuple[Check, ...]
    class_changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed. New classes are not a check: an operator allows them."""
        return all(check.passed for check in self.checks)

    @property
    def accepted(self) -> bool:
        """Whether every check passed and clients will see the same classes."""
        return self.passed and not self.class_changes

    def __str__(self) -> str:
        """The comparison as one text for the audit log, failed checks first."""
        checks = [
            f"{'' if check.passed else 'NOT '}passed: {check.what} {check.champion:.4g} → "
            f"{check.challenger:.4g}, allowed: {check.allowed}"
            for check in sorted(self.checks, key=lambda check: check.passed)
        ]
        return "; ".join(
            [
                f"challenger {self.challenger_accuracy:.4f}, champion "
                f"{self.champion_accuracy:.4f} on the same {self.examples:,} held-out pictures: "
                f"{len(self.gained)} gained, {len(self.lost)} lost, "
                f"McNemar p = {self.p_value:.3g}",
                *self.class_changes,
                *checks,
                *self.notes,
            ]
        )


def compare(
    champion: Bundle,
    challenger: Bundle,
    policy: Policy | None = None,
    timed: LatencyComparison | None = None,
    pairs: Pairs | None = None,
) -> GateComparison:
    """The comparison of ``challenger`` with ``champion``.

    Args:
        champion: the version that serves.
        challenger: the version that would replace it.
        policy: what the challenger may lose; by default the default policy.
        timed: the forward times of both; without them, latency is not checked.
        pairs: the result of ``pair_heldout`` for these two, if the caller already has it.

    Raises:
        PromotionRefused: there are too few pictures on which the two can be compared.
        BundleInvalid: a held-out record is missing or damaged.
    """
    policy = policy or Policy()
    pairs = pairs or pair_heldout(champion, challenger, policy.min_examples)
    old, new = pairs.champion, pairs.challenger
    gained, lost = new.right & ~old.right, old.right & ~new.right
    p_value = mcnemar(int(gained.sum()), int(lost.sum()))
    checks = [
        _check_accuracy(old, new, p_value, policy),
        _check_classes(old, new, challenger.manifest.labels, policy),
        _check_calibration(old, new, policy),
        _check_log_loss(old, new, policy),
        *_check_latency(timed, policy),
    ]
    notes = [*pairs.notes] if timed else [*pairs.notes, "forward passes were not timed"]
    if champion.manifest.preprocess != challenger.manifest.preprocess:
        notes.append("the pictures are preprocessed differently (size, mean or deviation)")
    return GateComparison(
        examples=len(old.labels),
        champion_accuracy=old.accuracy,
        challenger_accuracy=new.accuracy,
        gained=tuple(pairs.positions[gained].tolist()),
        lost=tuple(pairs.positions[lost].tolist()),
        p_value=p_value,
        checks=tuple(checks),
        class_changes=pairs.class_changes,
        notes=tuple(notes),
    )


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p-value, from the pictures that only one of the two gets right.

    ``scipy.stats.binomtest`` gives the same, but importing ``scipy.stats`` takes a second.
    """
    return min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))


def _check_accuracy(old: Scores, new: Scores, p_value: float, policy: Policy) -> Check:
    loss = (int(old.right.sum()) - int(new.right.sum())) / len(old.right)
    return Check(
        what="accuracy",
        champion=old.accuracy,
        challenger=new.accuracy,
        allowed=f"no significant loss (p < {policy.significance:g}), none over "
        f"{100 * policy.max_accuracy_loss:g} points",
        passed=loss <= 0 or (loss <= policy.max_accuracy_loss and p_value >= policy.significance),
        note=f"McNemar p = {p_value:.3g}",
    )


def _check_classes(old: Scores, new: Scores, labels: Labels, policy: Policy) -> Check:
    """The class with the largest loss of recall; classes that break the policy come first."""
    rows: list[tuple[bool, float, Check]] = []
    classes = len(np.unique(new.labels))
    old_right, new_right = old.right, new.right  # computed once: each is an argmax over all rows
    for index, label in enumerate(labels):
        of_class = new.labels == index  # the champion may number the classes differently
        count = int(of_class.sum())
        if not count:
            continue
        before, after = old_right[of_class], new_right[of_class]
        gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
        change = (gained - lost) / count
        p_value = mcnemar(gained, lost)
        low, high = _interval(gained, lost, count)
        significant = p_value * classes < policy.significance
        broken = -change > policy.max_recall_loss and (
            significant or -high > policy.max_recall_loss
        )
        note = f"{100 * change:+.1f} points, 95 % {100 * low:+.1f} … {100 * high:+.1f}"
        if not broken and -change > policy.max_recall_loss:
            note += f"; not significant with {count:,} pictures"
        check = Check(
            what=f"recall of {label!r}",
            champion=float(before.mean()),
            challenger=float(after.mean()),
            allowed=f"no significant loss over {100 * policy.max_recall_loss:g} points",
            passed=not broken,
            note=note,
        )
        rows.append((not broken, change, check))
    return min(rows, key=lambda row: row[:2])[2]


def _interval(gained: int, lost: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a difference of paired proportions, as (low, high).

    Agresti & Min (2005), doi:10.1002/sim.1781: adds half a picture to each of the four cells.
    """
    gained_, lost_, count_ = gained + 0.5, lost + 0.5, count + 2
    change = (gained_ - lost_) / count_
    spread = Z_95 * ((gained_ + lost_ - (gained_ - lost_) ** 2 / count_) ** 0.5) / count_
    return max(-1.0, change - spread), min(1.0, change + spread)


def _check_calibration(old: Scores, new: Scores, policy: Policy) -> Check:
    before, after, limit = (
        old.calibration_error,
        new.calibration_error,
        policy.max_calibration_loss,
    )
    return Check(
        what="calibration error",
        champion=before,
        challenger=after,
        allowed="any" if limit is None else f"{limit:g} more",
        passed=limit is None or after - before <= limit,
    )


def _check_latency(timed: LatencyComparison | None, policy: Policy) -> list[Check]:
    if timed is None:
        return []
    return [
        Check(
            what=f"forward ms of {size}",
            champion=before,
            challenger=timed.challenger_ms[size],
            allowed=f"{policy.max_latency_ratio:g} times",
            passed=timed.challenger_ms[size] <= policy.max_latency_ratio * before,
            note=f"{timed.plans[0]} and {timed.plans[1]} on {timed.device}",
        )
        for size, before in timed.champion_ms.items()
    ]


def _check_log_loss(old: Scores, new: Scores, policy: Policy) -> Check:
    before, after, limit = old.log_loss, new.log_loss, policy.max_log_loss_ratio
    return Check(
        what="log loss",
        champion=before,
        challenger=after,
        allowed="any" if limit is None else f"{limit:g} times",
        passed=limit is None or after <= limit * before,
    )
