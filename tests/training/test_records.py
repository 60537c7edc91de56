"""Publishing records the examples of a version, and the champion's scores of them."""

import io
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from registry.core.paths import Paths
from registry.model import bundle as bundles
from registry.model.bundle import WEIGHTS
from registry.promotion.gate import compare
from registry.promotion.promotion import promote
from registry.store.mlflow_store import ModelStore
from tests.conftest import MakeBundle, Publish, load_eager, tiny_model
from training.data.sources import Dataset, take
from training.publishing import records
from training.publishing.evaluate import Evaluation
from training.publishing.publish import write_version
from training.publishing.records import ChampionScores, difference_hashes, score_champion


def test_the_champion_is_scored_on_the_held_out_pictures_of_the_next_version(
    store: ModelStore, publish: Publish, make_bundle: MakeBundle, few_digits: Dataset
) -> None:
    assert score_champion(store, "digits", few_digits.validation, "cpu") is None  # no such model
    publish(seed=0)
    assert score_champion(store, "digits", few_digits.validation, "cpu") is None  # no champion
    promote(store, "digits", 1)
    others = take(few_digits.train, np.arange(100))
    scores = score_champion(store, "digits", others, "cpu")
    assert scores is not None
    champion = make_bundle(seed=0)
    assert scores.manifest_sha256 == champion.manifest_sha256
    expected = load_eager(champion).classify(others.pixels)
    np.testing.assert_allclose(scores.probabilities, expected, atol=1e-5)


def test_versions_without_a_common_picture_are_compared_by_these_scores(
    make_bundle: MakeBundle, few_digits: Dataset, tmp_path: Path
) -> None:
    champion = make_bundle(seed=0)
    others = take(few_digits.test, np.arange(60))
    other_data = replace(few_digits, validation=others)
    scores = load_eager(champion).classify(others.pixels)
    perfect = np.eye(10, dtype=np.float32)[others.labels]
    (tmp_path / "empty").mkdir()
    challenger = write_version(
        tmp_path / "next",
        champion.manifest,
        tiny_model(few_digits),
        other_data,
        Evaluation(others.labels, perfect),
        tmp_path / "empty",
        {},
        ChampionScores(champion.manifest_sha256, scores),
    )
    result = compare(champion, challenger)
    assert result.accepted
    assert (result.examples, result.challenger_accuracy) == (60, 1.0)
    assert result.champion_accuracy == Evaluation(others.labels, scores).accuracy
    assert "publishing has scored the champion" in str(result)


def test_a_champion_that_cannot_be_run_is_not_scored_and_does_not_end_the_training(
    store: ModelStore,
    publish: Publish,
    registry_paths: Paths,
    few_digits: Dataset,
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish(seed=0)
    promote(store, "digits", 1)
    for path in registry_paths.artifacts.rglob(WEIGHTS):
        path.write_bytes(b"damaged")
    assert score_champion(store, "digits", few_digits.validation, "cpu") is None
    assert "the champion cannot be scored on the new held-out pictures" in caplog.text


def test_the_records_have_the_digests_of_the_data_set(
    make_bundle: MakeBundle, few_digits: Dataset
) -> None:
    bundle = make_bundle()
    digests = [each.tobytes().hex() for each in bundle.heldout().digests]
    assert digests == list(few_digits.validation.digests)
    assert [f"{each:016x}" for each in bundle.training().digests] == [
        digest[:16] for digest in few_digits.train.digests
    ]


def test_no_more_held_out_examples_are_kept_than_the_gate_may_unpack(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_bytes = records.HEADERS_BYTES + 10 * (8 + 32 + 8 + 4 * 10) + 5
    for module in (records, bundles):
        monkeypatch.setattr(module, "MAX_ARRAYS_BYTES", limit_bytes)
    heldout = make_bundle().heldout()
    assert len(heldout.labels) == len(heldout.digests) == len(heldout.perceptual_hashes) == 10


def test_a_lossy_copy_has_nearly_the_same_perceptual_hash_and_another_picture_does_not() -> None:
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (20, 12, 12, 3), dtype=np.uint8)
    pictures = [
        Image.fromarray(each).resize((160, 160), Image.Resampling.BICUBIC) for each in coarse
    ]
    copies = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=75)
        copies.append(np.asarray(Image.open(file).resize((64, 64))))
    perceptual_hashes = difference_hashes(np.stack([np.asarray(each) for each in pictures]))
    again = difference_hashes(np.stack(copies))
    assert np.bitwise_count(perceptual_hashes ^ again).max() <= 6
    apart = np.bitwise_count(perceptual_hashes[:, None] ^ again)
    assert apart[~np.eye(20, dtype=bool)].min() > 6
    grey = np.stack(copies)[..., :1]
    assert difference_hashes(grey).shape == (20,)
