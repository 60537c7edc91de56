"""Which pictures two versions are compared on when their data differ, and which notes result."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from registry.core.errors import PromotionRefused
from registry.model.bundle import CHAMPION_SCORES, Bundle, to_npz, write_bundle
from registry.promotion.gate import GateComparison, compare
from registry.promotion.pairing import describe_classes
from registry.promotion.policy import Policy
from tests.conftest import MakeBundle
from tests.example_records import heldout_file, training_file

ANIMALS = ("cat", "dog")


def scores_of(answers: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[answers]


@pytest.fixture
def version(make_bundle: MakeBundle, tmp_path: Path) -> Callable[..., Bundle]:
    """A function that makes a bundle with made-up records.

    ``heldout`` has each held-out example by its number: its label and the version's answer. The
    examples in ``copies`` are held out twice.
    """
    manifest = make_bundle().manifest

    def make(
        heldout: dict[int, tuple[str, str]],
        labels: tuple[str, ...] = ANIMALS,
        trained: Iterable[int] = (),
        champion: tuple[Bundle, list[str]] | None = None,
        perceptual_hashes: np.ndarray | None = None,
        copies: Iterable[int] = (),
    ) -> Bundle:
        number = {label: index for index, label in enumerate(labels)}
        numbers = [*heldout, *copies]
        truth = np.array([number[heldout[each][0]] for each in numbers])
        scores = scores_of([number[heldout[each][1]] for each in numbers], len(labels))
        files = {
            **heldout_file(truth, scores, numbers, perceptual_hashes),
            **training_file(list(trained)),
        }
        changes: dict[str, object] = {"labels": labels, "files": {}}
        if champion is not None:
            bundle, answers = champion
            known = bundle.manifest.labels
            files[CHAMPION_SCORES] = to_npz(
                probabilities=scores_of([known.index(each) for each in answers], len(known))
            )
            changes["scored_champion"] = bundle.manifest_sha256
        folder = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
        return write_bundle(folder, msgspec.structs.replace(manifest, **changes), files)

    return make


def right(numbers: Iterable[int], label: str = "cat") -> dict[int, tuple[str, str]]:
    return dict.fromkeys(numbers, (label, label))


def wrong(numbers: Iterable[int], label: str = "cat", answer: str = "dog") -> Any:
    return dict.fromkeys(numbers, (label, answer))


def notes(comparison: GateComparison) -> str:
    return "; ".join(comparison.notes)


def test_equal_data_are_compared_completely_and_without_a_note(
    version: Callable[..., Bundle],
) -> None:
    comparison = compare(version(right(range(50))), version(right(range(50))))
    assert (comparison.examples, comparison.accepted) == (50, True)
    assert comparison.notes == ("forward passes were not timed",)


def test_copies_of_a_picture_do_not_count_as_removed(version: Callable[..., Bundle]) -> None:
    comparison = compare(
        version(right(range(50)), copies=[3]), version(right(range(50)), copies=[3])
    )
    assert comparison.notes == ("forward passes were not timed",)


def test_the_order_of_the_pictures_does_not_matter(version: Callable[..., Bundle]) -> None:
    old = version({**right(range(40)), **wrong(range(40, 50))})
    new = version({**wrong(range(49, 39, -1)), **right(range(39, -1, -1))})
    comparison = compare(old, new)
    assert (comparison.examples, comparison.gained, comparison.lost) == (50, (), ())


def test_versions_with_more_pictures_are_compared_on_the_common_ones(
    version: Callable[..., Bundle],
) -> None:
    old = version({**right(range(38)), **wrong(range(38, 40))})
    new = version({**wrong(range(100, 120)), **right(range(40))})  # 20 new ones, all wrong
    comparison = compare(old, new)
    assert comparison.accepted
    assert (comparison.champion_accuracy, comparison.challenger_accuracy) == (0.95, 1.0)
    assert comparison.gained == (58, 59)  # positions among the challenger's held-out pictures
    assert "the champion held out 40 pictures, the challenger 60: 40 in common, 20 new" in notes(
        comparison
    )


def test_a_worse_version_is_refused_with_the_figures_of_the_common_pictures(
    version: Callable[..., Bundle],
) -> None:
    old = version(right(range(40)))
    new = version({**wrong(range(20)), **right(range(20, 40)), **right(range(100, 160))})
    comparison = compare(old, new)
    assert not comparison.accepted
    assert (comparison.champion_accuracy, comparison.challenger_accuracy) == (1.0, 0.5)
    assert "challenger 0.5000, champion 1.0000 on the same 40 held-out pictures" in str(comparison)


def test_with_too_few_common_pictures_the_scores_of_publishing_decide(
    version: Callable[..., Bundle],
) -> None:
    old = version(right(range(60)))
    answers = ["cat"] * 30 + ["dog"] * 20
    numbers = [*range(100, 140), *range(10)]
    new = version(right(numbers), champion=(old, answers))
    comparison = compare(old, new)
    assert (comparison.examples, comparison.champion_accuracy) == (50, 0.6)
    assert comparison.accepted
    assert "both held out only 10 pictures, 30 are needed; compared on all" in notes(comparison)
    assert "50 removed" in notes(comparison)
    assert compare(old, new, Policy(min_examples=10)).examples == 10


def test_a_refusal_for_too_few_common_pictures_has_figures_and_advice(
    version: Callable[..., Bundle],
) -> None:
    old, other = version(right(range(60))), version(wrong(range(60)))
    numbers = [*range(100, 140), *range(10)]
    for champion in (None, (other, ["cat"] * 50)):
        with pytest.raises(PromotionRefused) as caught:
            compare(old, version(right(numbers), champion=champion))
        for part in (
            "both held out only 10 pictures, 30 are needed",
            "champion 1.0000 of 60, challenger 1.0000 of 50",
            "Train the challenger again",
            "min_examples",
            "--force",
        ):
            assert part in str(caught.value)
    easy = version(right(range(3)), champion=(old, ["cat"] * 3))
    with pytest.raises(
        PromotionRefused, match="scored the champion on 3 pictures that can be used"
    ):
        compare(old, easy)


def test_a_class_without_a_common_picture_is_compared_by_the_scores_of_publishing(
    version: Callable[..., Bundle],
) -> None:
    old = version({**right(range(40)), **right(range(40, 50), "dog")})
    data = {**right(range(40)), **wrong(range(100, 110), "dog", "cat")}
    without = compare(old, version(data))
    assert (without.examples, without.accepted) == (40, True)
    assert "both held out no picture of class 'dog'" in notes(without)
    scored = compare(old, version(data, champion=(old, ["cat"] * 40 + ["dog"] * 10)))
    assert (scored.examples, scored.challenger_accuracy, scored.accepted) == (50, 0.8, False)


def test_a_class_of_which_no_picture_is_compared_is_named(version: Callable[..., Bundle]) -> None:
    old = version({**right(range(40)), **right(range(40, 50), "dog")})
    for heldout in (right(range(40)), {**right(range(40)), **right(range(40, 50))}):
        comparison = compare(old, version(heldout))
        assert (comparison.examples, comparison.accepted) == (40, True)
        assert "NOT compared, because none of its pictures can be used: class 'dog'" in notes(
            comparison
        )
        assert "class 'dog'" in str(comparison)
    both = version({**right(range(40)), **right(range(40, 50), "dog")})
    assert "NOT compared" not in notes(compare(old, both))


def test_half_of_a_small_record_is_enough(version: Callable[..., Bundle]) -> None:
    old = version(right(range(12)))
    assert compare(old, version(right(range(6, 18)))).examples == 6
    with pytest.raises(PromotionRefused, match="both held out only 5 pictures, 6 are needed"):
        compare(old, version(right(range(7, 18))))


def test_pictures_that_trained_a_version_are_left_out(version: Callable[..., Bundle]) -> None:
    old = version(right(range(40)), trained=[0, 1, 2, *range(100, 104)])
    new = version(
        {**right(range(3)), **wrong([3]), **right(range(4, 40))}, trained=[2, 3, *range(200, 300)]
    )
    comparison = compare(old, new)
    assert (comparison.examples, comparison.accepted) == (36, True)
    assert "3 pictures left out: in the training data of the champion" in notes(comparison)
    assert "1 picture left out: in the training data of the challenger" in notes(comparison)


def test_the_scores_of_publishing_do_not_count_pictures_that_trained_the_champion(
    version: Callable[..., Bundle],
) -> None:
    """A folder with fixed splits, whose splits have changed since."""
    old = version(right(range(40)), trained=range(100, 140))
    new = version(
        right([*range(100, 140), *range(200, 240)]),
        trained=range(40),
        champion=(old, ["cat"] * 70 + ["dog"] * 10),
    )
    comparison = compare(old, new)
    assert (comparison.examples, comparison.champion_accuracy) == (40, 0.75)
    assert "40 pictures left out: in the training data of the champion" in notes(comparison)
    assert "40 are now in the training data of the challenger" in notes(comparison)
    assert "40 new" in notes(comparison)


def test_relabelled_removed_and_reencoded_pictures_are_distinguished(
    version: Callable[..., Bundle],
) -> None:
    old = version({**right(range(50)), **right(range(50, 60), "dog")})
    # 0 to 4 are dogs now; 50 to 54 are gone; 55 to 59 were replaced by pictures that look alike.
    kept = {**wrong(range(5), "dog"), **right(range(5, 50)), **right(range(200, 204), "dog")}
    perceptual_hashes = version(kept).heldout().perceptual_hashes.copy()
    two_bits = np.uint64(3)
    perceptual_hashes[-4:] = old.heldout().perceptual_hashes[55:59] ^ two_bits
    new = version(kept, perceptual_hashes=perceptual_hashes)
    comparison = compare(old, new)
    assert comparison.examples == 45
    assert "5 pictures left out: re-labelled (cat → dog: 5)" in notes(comparison)
    expected = "10 removed, 4 of them probably re-encoded: new pictures look alike"
    assert expected in notes(comparison)


def test_a_new_class_must_be_allowed_and_the_shared_ones_are_compared(
    version: Callable[..., Bundle],
) -> None:
    old = version({**right(range(20)), **right(range(20, 40), "dog")})
    new = version(
        {**right(range(20)), **wrong(range(20, 22), "dog", "bird"), **right(range(22, 40), "dog")}
        | {**right(range(100, 108), "bird"), **wrong(range(108, 110), "bird", "cat")},
        labels=("bird", "cat", "dog"),
    )
    comparison = compare(old, new)
    assert comparison.examples == 40
    assert (comparison.champion_accuracy, comparison.challenger_accuracy) == (1.0, 0.95)
    assert not comparison.passed  # two dogs were taken for birds
    assert comparison.class_changes == (
        "labels that appear: 'bird'",
        "indices that change: 'cat' 0 → 1, 'dog' 1 → 2",
    )
    assert "new classes, right on held-out pictures: 'bird' 8 of 10" in notes(comparison)
    good = version(right(range(20)) | right(range(20, 40), "dog"), labels=("bird", "cat", "dog"))
    comparison = compare(old, good)
    assert (comparison.passed, comparison.accepted) == (True, False)
    assert "labels that appear: 'bird'" in str(comparison)


def test_a_class_that_disappears_does_not_count_against_the_others(
    version: Callable[..., Bundle],
) -> None:
    old = version({**right(range(20)), **right(range(20, 40), "dog")}, labels=("cat", "dog", "eel"))
    comparison = compare(old, version(right(range(20)) | right(range(20, 40), "dog")))
    assert comparison.passed
    assert comparison.class_changes == ("labels that disappear: 'eel'",)


def test_a_class_most_of_whose_pictures_have_one_new_label_is_renamed(
    version: Callable[..., Bundle],
) -> None:
    old = version({**right(range(20)), **right(range(20, 40), "dog")})
    new = version(
        right(range(20), "kitten") | right(range(20, 40), "dog"), labels=("dog", "kitten")
    )
    comparison = compare(old, new)
    assert (comparison.examples, comparison.passed) == (40, True)
    assert comparison.class_changes == (
        "labels that are renamed: 'cat' → 'kitten'",
        "indices that change: 'kitten' 0 → 1, 'dog' 1 → 0",
    )


def test_long_lists_of_classes_are_cut(version: Callable[..., Bundle]) -> None:
    old = tuple(f"a{number}" for number in range(100))
    (appear, disappear) = describe_classes(old, tuple(f"b{number}" for number in range(100)))
    assert appear.endswith("'b7' and 92 more")
    assert disappear.startswith("labels that disappear: 'a0', 'a1'")
    assert describe_classes(old, old) == ()
