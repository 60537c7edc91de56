import msgspec
import numpy as np
import pytest

from registry.bundle import Heldout, write_bundle
from registry.contract import DataRecord
from registry.errors import PromotionRefused
from registry.gates import compare
from tests.conftest import MakeBundle


@pytest.fixture
def bundle_with(make_bundle: MakeBundle, tmp_path):
    """A bundle whose held-out record says which of 100 pictures were right."""
    real = make_bundle()

    def make(name: str, right: np.ndarray, change=lambda manifest: manifest):
        labels = np.zeros(len(right), dtype=np.int64)
        probabilities = np.eye(10, dtype=np.float32)[np.where(right, 0, 1)]
        files = {"heldout.npz": Heldout(labels, probabilities).to_npz()}
        return write_bundle(tmp_path / name, change(real.manifest), files)

    return make


def test_the_comparison_is_picture_by_picture(bundle_with) -> None:
    champion = np.arange(100) < 80
    challenger = (np.arange(100) < 75) | (np.arange(100) >= 85)
    verdict = compare(bundle_with("old", champion), bundle_with("new", challenger))
    assert verdict.accepted
    assert (verdict.gained, verdict.lost) == (15, 5)
    assert verdict.champion_accuracy == pytest.approx(0.80)
    assert verdict.challenger_accuracy == pytest.approx(0.90)
    # Exact binomial: 2 · P(X ≤ 5), X ~ B(20, 1/2).
    assert verdict.p_value == pytest.approx(0.04139, abs=1e-5)
    assert "15 gained, 5 lost" in str(verdict)


def test_a_worse_challenger_is_not_accepted(bundle_with) -> None:
    verdict = compare(
        bundle_with("old", np.arange(100) < 80), bundle_with("new", np.arange(100) < 79)
    )
    assert not verdict.accepted
    assert verdict.p_value == 1.0


def test_equals_are_accepted(bundle_with) -> None:
    right = np.arange(100) < 80
    verdict = compare(bundle_with("old", right), bundle_with("new", right))
    assert verdict.accepted
    assert verdict.p_value == 1.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: msgspec.structs.replace(m, labels=tuple("abcdefghij")), "the labels differ"),
        (
            lambda m: msgspec.structs.replace(
                m,
                data=DataRecord(name="other", sha256="0" * 64, heldout_sha256="1" * 64, counts={}),
            ),
            "different held-out pictures",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(bundle_with, change, reason: str) -> None:
    right = np.ones(10, dtype=bool)
    with pytest.raises(PromotionRefused, match=reason):
        compare(bundle_with("old", right), bundle_with("new", right, change))
