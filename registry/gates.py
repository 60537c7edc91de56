"""Is the challenger good enough? Two versions judged on the same held-out pictures, pair by pair.

Pure: two opened bundles in, a verdict out. Who asks, and what follows, is ``promotion``'s matter.
"""

from msgspec import Struct
from scipy.stats import binomtest

from registry.bundle import Bundle
from registry.errors import PromotionRefused


class Verdict(Struct, frozen=True, kw_only=True):
    """The comparison of a challenger with the champion.

    Accuracies are of the held-out pictures. ``gained`` and ``lost`` count the pictures that only
    the challenger, or only the champion, gets right; ``p_value`` is McNemar's exact two-sided one:
    how likely such a split is if both were equally good (McNemar 1947).
    """

    accepted: bool
    examples: int
    champion_accuracy: float
    challenger_accuracy: float
    gained: int
    lost: int
    p_value: float

    def __str__(self) -> str:
        return (
            f"challenger {self.challenger_accuracy:.4f}, champion {self.champion_accuracy:.4f} "
            f"on the same {self.examples:,} held-out pictures: {self.gained} gained, "
            f"{self.lost} lost, McNemar p = {self.p_value:.3g}"
        )


def compare(champion: Bundle, challenger: Bundle) -> Verdict:
    """The verdict: accepted unless the challenger gets fewer held-out pictures right.

    Raises:
        PromotionRefused: the two were not judged on the same pictures with the same labels.
        BundleInvalid: the held-out record of one is missing or damaged.
    """
    ours, theirs = challenger.manifest, champion.manifest
    if ours.labels != theirs.labels:
        raise PromotionRefused(
            "the labels differ, so clients would get other answers: "
            f"champion {list(theirs.labels)}, challenger {list(ours.labels)}"
        )
    if ours.data.heldout_sha256 != theirs.data.heldout_sha256:
        raise PromotionRefused(
            "the two were judged on different held-out pictures "
            f"(champion: {theirs.data.name} {theirs.data.heldout_sha256[:12]}…, "
            f"challenger: {ours.data.name} {ours.data.heldout_sha256[:12]}…), "
            "so their figures cannot be compared"
        )
    champion_right, challenger_right = champion.heldout().right, challenger.heldout().right
    gained = int((challenger_right & ~champion_right).sum())
    lost = int((champion_right & ~challenger_right).sum())
    return Verdict(
        accepted=gained >= lost,
        examples=len(champion_right),
        champion_accuracy=float(champion_right.mean()),
        challenger_accuracy=float(challenger_right.mean()),
        gained=gained,
        lost=lost,
        p_value=float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    )
