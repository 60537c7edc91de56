"""The gate on versions of a registry: downloads, comparison, timing, and what it prints."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from registry.cli.main import main as command
from registry.core.errors import BundleInvalid, PromotionRefused
from registry.core.paths import Paths
from registry.model.bundle import HELDOUT
from registry.model.refs import ModelRef, ModelVersion
from registry.promotion import latency_comparison
from registry.promotion.gate import compare
from registry.promotion.gate_runner import GateResult, GateRunner
from registry.promotion.latency_comparison import LatencyComparison, compare_latency
from registry.promotion.policy import Policy
from registry.promotion.promotion import promote
from registry.store.mlflow_store import ModelStore
from tests.conftest import MakeBundle, Publish
from training.data.sources import Dataset


@pytest.fixture
def both(
    store: ModelStore, publish: Publish, better_and_worse_seed: tuple[int, int]
) -> tuple[ModelVersion, ModelVersion]:
    """A worse version 1 and a better version 2 in the registry."""
    better, worse = better_and_worse_seed
    return publish(seed=worse), publish(seed=better)


def run_gate(store: ModelStore, paths: Paths, *versions: Any) -> GateResult:
    return GateRunner(store, paths, {}, timed=False).run(*versions)


def test_a_better_version_is_accepted_with_the_changed_predictions(
    store: ModelStore, both: tuple[ModelVersion, ModelVersion], registry_paths: Paths
) -> None:
    result = run_gate(store, registry_paths, *both)
    assert result.accepted
    assert result.comparison is not None
    assert (result.champion, result.challenger) == (1, 2)
    gained = [change for change in result.prediction_changes if change.gained]
    assert {change.position for change in gained} == set(result.comparison.gained)
    for change in result.prediction_changes:
        right, wrong = change.challenger, change.champion
        if not change.gained:
            right, wrong = wrong, right
        assert right[0] == change.truth != wrong[0]
        assert change.picture is not None
    confidences = [change.champion[1] for change in gained]
    assert confidences == sorted(confidences, reverse=True)
    table = result.table()
    assert "challenger 2, champion 1: accepted" in table
    assert "forward passes were not timed" in table
    again = msgspec.json.decode(msgspec.json.encode(result), type=GateResult)
    assert again == result


def test_a_changed_prediction_has_the_picture_of_the_held_out_record(
    store: ModelStore,
    both: tuple[ModelVersion, ModelVersion],
    registry_paths: Paths,
    few_digits: Dataset,
    tmp_path: Path,
) -> None:
    change = run_gate(store, registry_paths, *both).prediction_changes[0]
    assert change.picture is not None
    (tmp_path / "change.png").write_bytes(change.picture)
    with Image.open(tmp_path / "change.png") as shown:
        expected = few_digits.validation.pixels[change.position][..., 0]
        assert np.array_equal(np.asarray(shown), expected)
    assert few_digits.labels[few_digits.validation.labels[change.position]] == change.truth


def test_a_gate_result_is_cached_until_the_policy_or_a_version_changes(
    store: ModelStore,
    both: tuple[ModelVersion, ModelVersion],
    registry_paths: Paths,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = run_gate(store, registry_paths, *both)
    monkeypatch.setattr(store, "download", lambda *arguments: pytest.fail("the gate ran again"))
    assert run_gate(store, registry_paths, *both) == first
    assert GateRunner(store, registry_paths, {}, timed=False).known(both[1], both[0]) is None
    policy = registry_paths.policy("digits")
    policy.parent.mkdir()
    policy.write_text("significance = 0.01")
    assert GateRunner(store, registry_paths, {}, timed=False).known(*both) is None


def test_a_version_that_cannot_be_read_is_refused(
    store: ModelStore, publish: Publish, registry_paths: Paths
) -> None:
    first, second = publish(seed=0), publish(seed=2)
    for path in registry_paths.artifacts.rglob(HELDOUT):
        path.write_bytes(b"damaged")
    result = run_gate(store, registry_paths, first, second)
    assert (result.accepted, result.comparison) == (False, None)
    assert "has sha256" in result.summary
    assert "REFUSED" in result.table()
    assert run_gate(store, registry_paths, None, first).summary.startswith(
        "there was no champion"
    ) is (False)


def test_new_classes_pass_only_if_the_operator_allows_them(
    store: ModelStore,
    publish: Publish,
    registry_paths: Paths,
    better_and_worse_seed: tuple[int, int],
) -> None:
    better, worse = better_and_worse_seed
    letters = tuple("abcdefghij")
    champion = publish(seed=worse)
    other = publish(seed=better, change=lambda each: msgspec.structs.replace(each, labels=letters))
    result = run_gate(store, registry_paths, champion, other)
    assert result.comparison is not None
    assert result.comparison.class_changes[0].startswith("labels that are renamed: '0' → 'a'")
    assert not result.accepted
    assert not result.accepts(allow_new_classes=False)
    assert result.accepts(allow_new_classes=True)
    assert "NO, unless --allow-new-classes" in result.table()
    assert "accepted" in result.table(allow_new_classes=True)
    promote(store, "digits", 1)
    with pytest.raises(PromotionRefused, match=r"'0' → 'a'.* --allow-new-classes accepts that"):
        promote(store, "digits", 2)
    line = promote(store, "digits", 2, allow_new_classes=True)
    assert line.entry.action == "promoted"
    assert "--allow-new-classes allowed" in str(line.entry.details)
    with pytest.raises(PromotionRefused, match="NOT passed: accuracy"):
        promote(store, "digits", 1, allow_new_classes=True)


def test_a_slow_challenger_is_refused(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    timed = LatencyComparison(
        device="cpu",
        plans=("a", "b"),
        champion_ms={1: 1.0, 8: 4.0},
        challenger_ms={1: 1.5, 8: 9.0},
    )
    comparison = compare(bundle, bundle, None, timed)
    failed = [check.what for check in comparison.checks if not check.passed]
    assert failed == ["forward ms of 8"]
    assert compare(bundle, bundle, Policy(max_latency_ratio=3), timed).accepted
    assert "not timed" not in str(comparison)


@pytest.mark.slow
def test_both_versions_are_timed_in_a_separate_process(
    make_bundle: MakeBundle, paths: Paths
) -> None:
    timed = compare_latency(
        make_bundle(seed=0), make_bundle(seed=1), paths.plans, "cpu", "torch-eager", 1
    )
    assert timed is not None
    assert (timed.device, timed.plans) == ("cpu", ("torch-eager", "torch-eager"))
    for times in (timed.champion_ms, timed.challenger_ms):
        assert set(times) == {1, 8}
        assert all(0 < each < 1000 for each in times.values())


def test_without_an_engine_nothing_is_timed_and_a_failure_gives_the_reason(
    make_bundle: MakeBundle, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle()
    (bundle.folder / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(BundleInvalid, match=r"cannot be timed: .*has sha256"):
        compare_latency(bundle, bundle, paths.plans, "cpu", "torch-eager", 1)
    monkeypatch.setattr(latency_comparison, "catalogue", dict)
    assert compare_latency(bundle, bundle, paths.plans, "cpu", "torch-eager", 1) is None


def test_the_command_evaluate_changes_nothing(
    store: ModelStore,
    both: tuple[ModelVersion, ModelVersion],
    registry_paths: Paths,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    promote(store, "digits", 1)
    page = tmp_path / "gate-result.html"
    assert command(["evaluate", "digits", "--skip-latency", "--page", str(page), "--json"]) == 0
    shown = msgspec.json.decode(capsys.readouterr().out, type=GateResult)
    assert shown.accepted
    assert len(shown.prediction_changes) == len(
        [change for change in shown.prediction_changes if change.picture]
    )
    text = page.read_text()
    assert text.count("data:image/png;base64,") == len(shown.prediction_changes)
    assert "Accepted: version 2 compared with the champion, version 1" in text
    assert "<script" not in text
    assert store.aliases.read("digits")["champion"] == 1
    promote(store, "digits", 2)
    assert command(["evaluate", "digits", "1", "--skip-latency"]) == 2
    assert "REFUSED" in capsys.readouterr().out
    assert store.resolve(ModelRef("digits", alias="champion")).version == 2
