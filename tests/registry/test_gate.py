from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from registry.core.errors import BundleInvalid, PromotionRefused, UsageError
from registry.model.bundle import Bundle, write_bundle
from registry.promotion import gate
from registry.promotion.gate import compare, mcnemar
from registry.promotion.policy import Policy, read_policy
from tests.conftest import MakeBundle
from tests.example_records import heldout_file, training_file


@pytest.fixture
def bundle_with(make_bundle: MakeBundle, tmp_path: Path) -> Callable[..., Bundle]:
    """A function that makes a bundle whose held-out record has these right and wrong answers."""
    real = make_bundle()

    def make(name: str, right: np.ndarray, change: Any = lambda manifest: manifest) -> Any:
        labels = np.zeros(len(right), dtype=np.int64)
        probabilities = np.eye(10, dtype=np.float32)[np.where(right, 0, 1)]
        files = {**heldout_file(labels, probabilities), **training_file()}
        return write_bundle(tmp_path / name, change(real.manifest), files)

    return make


def test_versions_are_compared_picture_by_picture(bundle_with: Callable[..., Bundle]) -> None:
    champion = np.arange(100) < 80
    challenger = (np.arange(100) < 75) | (np.arange(100) >= 85)
    comparison = compare(bundle_with("old", champion), bundle_with("new", challenger))
    assert comparison.accepted
    assert (len(comparison.gained), len(comparison.lost)) == (15, 5)
    assert comparison.champion_accuracy == pytest.approx(0.80)
    assert comparison.challenger_accuracy == pytest.approx(0.90)
    # Exact binomial: 2 · P(X ≤ 5), X ~ B(20, 1/2).
    assert comparison.p_value == pytest.approx(0.04139, abs=1e-5)
    assert "15 gained, 5 lost" in str(comparison)


def test_a_worse_challenger_is_not_accepted(bundle_with: Callable[..., Bundle]) -> None:
    comparison = compare(
        bundle_with("old", np.arange(100) < 80), bundle_with("new", np.arange(100) < 79)
    )
    assert not comparison.accepted
    assert comparison.p_value == 1.0


def test_an_equal_challenger_is_accepted(bundle_with: Callable[..., Bundle]) -> None:
    right = np.arange(100) < 80
    comparison = compare(bundle_with("old", right), bundle_with("new", right))
    assert comparison.accepted
    assert comparison.p_value == 1.0


def heldout_of(
    classes: dict[int, tuple[int, int, int]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, and whether the old and the new version are right, for 100 pictures of each class.

    ``classes`` has the number of pictures that both, only the old, or only the new gets right.
    """
    labels, old, new = [], [], []
    for label, (both, only_old, only_new) in classes.items():
        labels += [label] * 100
        old += [True] * (both + only_old) + [False] * (100 - both - only_old)
        new += [True] * both + [False] * only_old + [True] * only_new
        new += [False] * (100 - both - only_old - only_new)
    return np.array(labels), np.array(old), np.array(new)


@pytest.fixture
def versus(bundle_with: Callable[..., Bundle], tmp_path: Path) -> Any:
    """A function that compares made-up held-out records; ``options`` are those of ``compare``."""

    def run_gate(
        classes: dict[int, tuple[int, int, int]], confidence: Any = (0.9, 0.9), **options: Any
    ) -> Any:
        labels, old, new = heldout_of(classes)
        bundles = []
        for name, right, sure in (("a", old, confidence[0]), ("b", new, confidence[1])):
            scores = np.full((len(labels), 10), (1 - sure) / 9, dtype=np.float32)
            guess = np.where(right, labels, (labels + 1) % 10)
            scores[np.arange(len(labels)), guess] = sure
            bundle = bundle_with(name, right)
            files = {**heldout_file(labels, scores), **training_file()}
            bundles.append(write_bundle(tmp_path / f"{name}-again", bundle.manifest, files))
        old_bundle, new_bundle = bundles
        return compare(old_bundle, new_bundle, **options)

    return run_gate


def failed(comparison: Any) -> list[str]:
    return [check.what for check in comparison.checks if not check.passed]


def test_an_insignificant_loss_passes_up_to_a_limit(versus: Any) -> None:
    every = dict.fromkeys(range(10), (90, 1, 1))
    assert versus({**every, 0: (90, 2, 0)}).accepted  # 11 lost, 9 gained of 1,000
    assert failed(versus({**every, 0: (90, 5, 1), 1: (90, 5, 1)})) == ["accuracy"]  # 0.8 points
    assert failed(versus(dict.fromkeys(range(10), (90, 1, 0)))) == ["accuracy"]  # significant


def test_a_class_that_loses_is_found_although_the_accuracy_rises(versus: Any) -> None:
    every = dict.fromkeys(range(10), (90, 0, 5))
    comparison = versus({**every, 3: (70, 20, 0)})
    assert comparison.challenger_accuracy > comparison.champion_accuracy
    assert failed(comparison) == ["recall of '3'"]
    (check,) = [each for each in comparison.checks if not each.passed]
    assert (check.champion, check.challenger) == (pytest.approx(0.9), pytest.approx(0.7))
    assert check.note.startswith("-20.0 points, 95 % -2")
    assert "NOT passed: recall of '3' 0.9 → 0.7" in str(comparison)
    assert versus({**every, 3: (86, 4, 0)}).accepted  # four points may be chance
    assert versus({**every, 3: (70, 20, 0)}, policy=Policy(max_recall_loss=0.25)).accepted


def test_a_policy_may_limit_calibration_error_and_log_loss(versus: Any) -> None:
    every = dict.fromkeys(range(10), (90, 0, 0))
    unsure = versus(every, confidence=(0.9, 0.6))
    assert unsure.accepted  # reported, but not limited by default
    figures = {check.what: (check.champion, check.challenger) for check in unsure.checks}
    assert figures["calibration error"] == (pytest.approx(0.0, abs=1e-6), pytest.approx(0.3))
    assert figures["log loss"][1] > figures["log loss"][0]
    strict = Policy(max_calibration_loss=0.1, max_log_loss_ratio=1.1)
    assert failed(versus(every, confidence=(0.9, 0.6), policy=strict)) == [
        "calibration error",
        "log loss",
    ]


def test_a_small_class_whose_pictures_are_all_lost_is_found(
    bundle_with: Callable[..., Bundle], tmp_path: Path
) -> None:
    labels = np.array([1] * 8 + [0] * 1000)
    right = np.ones(1008, dtype=bool)
    bundles = []
    for name, hit in (("old", right), ("new", labels != 1)):
        scores = np.eye(10, dtype=np.float32)[np.where(hit, labels, 2)]
        record = {**heldout_file(labels, scores), **training_file()}
        bundles.append(write_bundle(tmp_path / name, bundle_with(name, hit).manifest, record))
    comparison = compare(bundles[0], bundles[1], Policy(max_accuracy_loss=0.1))
    assert "recall of '1'" in failed(comparison)


def test_a_loss_of_exactly_the_limit_is_allowed(bundle_with: Callable[..., Bundle]) -> None:
    old, new = np.arange(1000) >= 20, (np.arange(1000) >= 30) | (np.arange(1000) < 5)
    comparison = compare(bundle_with("old", old), bundle_with("new", new))
    assert (comparison.champion_accuracy, comparison.challenger_accuracy) == (0.98, 0.975)
    assert "accuracy" not in failed(comparison)


def test_records_that_cannot_be_compared_are_refused(
    bundle_with: Callable[..., Bundle], tmp_path: Path
) -> None:
    good = bundle_with("good", np.ones(10, dtype=bool))
    odd = {
        "empty": heldout_file(np.zeros(0, np.int64), np.zeros((0, 10), np.float32)),
        "nan": heldout_file(np.zeros(10, np.int64), np.full((10, 10), np.nan, np.float32)),
    }
    for name, record in odd.items():
        bundle = write_bundle(
            tmp_path / f"odd-{name}", good.manifest, {**record, **training_file()}
        )
        why = r"contains NaN|do not fit"
        with pytest.raises((PromotionRefused, BundleInvalid), match=why):
            compare(good, bundle)


def test_different_preprocessing_is_noted(bundle_with: Callable[..., Bundle]) -> None:
    def other(manifest: Any) -> Any:
        spec = msgspec.structs.replace(manifest.preprocess, interpolation="nearest")
        return msgspec.structs.replace(manifest, preprocess=spec)

    right = np.arange(100) < 80
    comparison = compare(bundle_with("old", right), bundle_with("new", right, other))
    assert any("preprocessed differently" in note for note in comparison.notes)


def test_a_policy_is_read_from_its_file_and_an_error_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    assert read_policy(file) == Policy()
    file.write_text("max_recall_loss = 0.1\nsignificance = 0.01\n")
    assert read_policy(file) == Policy(max_recall_loss=0.1, significance=0.01)
    for wrong in ("max_recal_loss = 0.1", "significance = 2", "significance ="):
        file.write_text(wrong)
        with pytest.raises(UsageError, match=r"policy\.toml cannot be used"):
            read_policy(file)


def test_95_percent_of_the_intervals_contain_the_difference() -> None:
    """Simulates 2,000 paired samples with a known difference."""
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        _, only_old, only_new, _ = random.multinomial(100, (0.7, 0.12, 0.05, 0.13))
        low, high = gate._interval(int(only_new), int(only_old), 100)
        inside += low <= -0.07 <= high
    assert 0.93 < inside / 2000 < 0.975


@given(gained=st.integers(0, 500), lost=st.integers(0, 500))
def test_the_p_value_is_that_of_an_exact_binomial_test(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, abs=1e-9)
