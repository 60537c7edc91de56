from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch

from registry.core.errors import NetworkImpossible, UsageError
from registry.core.names import sha256_hex
from registry.model.manifest import ListedNetwork
from tests.conftest import CPU
from training.data.sources import Dataset, take
from training.fitting import loop
from training.fitting.augment import augment as augment_pixels
from training.fitting.loop import Epoch, Trained, fit
from training.fitting.recipes import Recipe
from training.fitting.steps import Steps, announce_steps, plan_steps

replace = msgspec.structs.replace


def weights_digest(trained: Trained) -> str:
    state = {
        name: each.contiguous() for name, each in trained.preprocessed.network.state_dict().items()
    }
    return sha256_hex(safetensors.torch.save(state))


def test_training_learns(few_digits: Dataset, recipe: Recipe) -> None:
    trained = fit(replace(recipe, epochs=10), few_digits, CPU, seed=0)
    assert trained.best.validation_accuracy > 0.6
    assert trained.history[-1].train_loss < trained.history[0].train_loss / 2
    assert not trained.interrupted


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_the_same_seed_gives_the_same_weights(
    few_digits: Dataset, recipe: Recipe, precision: Any
) -> None:
    noisy = replace(
        recipe,
        precision=precision,
        flip=True,
        crop_px=1,
        erase=0.5,
        network=ListedNetwork("cnn", {"filters": [4], "hidden": 16, "dropout": 0.3}),
    )
    digests = [weights_digest(fit(noisy, few_digits, CPU, seed)) for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_the_kept_epoch_is_the_most_accurate_on_validation_pictures(
    few_digits: Dataset, recipe: Recipe
) -> None:
    trained = fit(replace(recipe, epochs=6), few_digits, CPU, seed=0)
    best = max(epoch.validation_accuracy for epoch in trained.history)
    assert trained.best.validation_accuracy == best
    assert loop.validate(trained.preprocessed, few_digits.validation, CPU)[1] == best


class PowerCut(Exception):
    """The process ends between two epochs."""


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    few_digits: Dataset, recipe: Recipe, tmp_path: Path, optimizer: Any
) -> None:
    four_epochs = replace(recipe, epochs=4, optimizer=optimizer)
    checkpoint = tmp_path / "run.pt"

    def cut(epoch: Epoch) -> None:
        if epoch.number == 2:
            raise PowerCut

    with pytest.raises(PowerCut):
        fit(four_epochs, few_digits, CPU, 0, checkpoint=checkpoint, on_epoch=cut)
    seen: list[int] = []
    resumed = fit(
        *(four_epochs, few_digits, CPU, 0),
        checkpoint=checkpoint,
        resume=True,
        on_epoch=lambda epoch: seen.append(epoch.number),
    )
    assert seen == [3, 4]
    assert [epoch.number for epoch in resumed.history] == [1, 2, 3, 4]
    assert weights_digest(resumed) == weights_digest(fit(four_epochs, few_digits, CPU, 0))


def test_a_finished_run_can_be_resumed_to_publish_it(
    few_digits: Dataset, recipe: Recipe, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run.pt"
    first = fit(recipe, few_digits, CPU, 0, checkpoint=checkpoint)
    again = fit(recipe, few_digits, CPU, 0, checkpoint=checkpoint, resume=True)
    assert weights_digest(again) == weights_digest(first)


def test_a_run_resumes_only_from_a_checkpoint_of_the_same_run(
    few_digits: Dataset, recipe: Recipe, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(UsageError, match="no checkpoint to resume"):
        fit(recipe, few_digits, CPU, 0, checkpoint=checkpoint, resume=True)
    fit(recipe, few_digits, CPU, 0, checkpoint=checkpoint)
    with pytest.raises(UsageError, match="another recipe, data set, picture size or seed"):
        fit(recipe, few_digits, CPU, 1, checkpoint=checkpoint, resume=True)


@pytest.mark.parametrize("where", ["validate", "save_checkpoint"])
def test_ctrl_c_between_batches_keeps_the_best_epoch_too(
    few_digits: Dataset,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    original = getattr(loop, where)
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, where, interrupted)
    checkpoint = tmp_path / "run.pt"
    trained = fit(replace(recipe, epochs=3), few_digits, CPU, 0, checkpoint=checkpoint)
    assert trained.interrupted
    monkeypatch.setattr(loop, where, original)
    accuracy = loop.validate(trained.preprocessed, few_digits.validation, CPU)[1]
    assert accuracy == trained.best.validation_accuracy
    resumed = fit(replace(recipe, epochs=3), few_digits, CPU, 0, checkpoint=checkpoint, resume=True)
    assert len(resumed.history) == 3


def interrupt_in_epoch(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise KeyboardInterrupt while a batch of epoch ``number`` is being made."""
    calls = 0
    original = augment_pixels

    def augment(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == (number - 1) * 8 + 3:  # an epoch has 8 batches
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, "augment", augment)


def test_ctrl_c_keeps_the_best_epoch_so_far(
    few_digits: Dataset,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    interrupt_in_epoch(2, monkeypatch)
    trained = fit(recipe, few_digits, CPU, 0)
    assert trained.interrupted
    assert [epoch.number for epoch in trained.history] == [1]
    accuracy = loop.validate(trained.preprocessed, few_digits.validation, CPU)[1]
    assert accuracy == trained.best.validation_accuracy
    assert "keeping epoch 1" in caplog.text


def test_ctrl_c_in_the_first_epoch_is_raised_to_the_caller(
    few_digits: Dataset, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_in_epoch(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, few_digits, CPU, 0)


def test_training_stops_early_when_the_accuracy_does_not_rise(
    few_digits: Dataset, recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    stuck = replace(recipe, epochs=20, learning_rate=1e-12, patience_epochs=2)
    checkpoint = tmp_path / "run.pt"
    assert len(fit(stuck, few_digits, CPU, 0, checkpoint=checkpoint).history) == 3
    resumed = fit(stuck, few_digits, CPU, 0, checkpoint=checkpoint, resume=True)
    assert len(resumed.history) == 3
    assert "stopping early" in caplog.text


def test_a_loss_that_is_not_finite_is_reported(few_digits: Dataset, recipe: Recipe) -> None:
    wild = replace(recipe, optimizer="sgd", learning_rate=1e30, precision="fp32")
    with pytest.raises(UsageError, match="the loss is not finite; try a lower learning rate"):
        fit(wild, few_digits, CPU, 0)


def test_a_network_that_does_not_fit_the_pictures_is_refused(few_digits: Dataset) -> None:
    too_deep = Recipe(name="deep", network=ListedNetwork("cnn"), epochs=1)
    with pytest.raises(NetworkImpossible, match="pool2"):
        fit(too_deep, few_digits, CPU, 0)


def test_the_learning_rate_warms_up_and_falls_to_zero(recipe: Recipe) -> None:
    steps = Steps(batch_size=32, per_epoch=10, total=100, learning_rate=recipe.learning_rate)
    rates = [loop._learning_rate(recipe, steps, step) for step in range(100)]
    assert rates[0] == pytest.approx(recipe.learning_rate / 10)
    assert max(rates) == pytest.approx(recipe.learning_rate)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < recipe.learning_rate / 1000


def some_of(data: Dataset, count: int) -> Dataset:
    return replace(data, train=take(data.train, np.arange(count)))


def test_small_data_gets_small_batches_and_large_data_large_ones(
    digits: Dataset, recipe: Recipe
) -> None:
    automatic = replace(recipe, batch_size=None)
    sizes = {count: plan_steps(automatic, some_of(digits, count)) for count in (2, 160, 1200)}
    assert [(steps.batch_size, steps.per_epoch) for steps in sizes.values()] == [
        (2, 1),
        (8, 20),
        (32, 38),
    ]
    assert sizes[160].total == 20 * recipe.epochs
    assert sizes[160].learning_rate == recipe.learning_rate
    sgd = plan_steps(replace(automatic, optimizer="sgd"), some_of(digits, 160))
    assert sgd.learning_rate == pytest.approx(recipe.learning_rate * 8 / 128)
    pinned = plan_steps(replace(recipe, optimizer="sgd"), some_of(digits, 160))
    assert (pinned.batch_size, pinned.learning_rate) == (32, recipe.learning_rate)


@pytest.mark.parametrize(("side_px", "size"), [(64, 32), (224, 32), (448, 8), (512, 4), (2048, 2)])
def test_large_pictures_get_small_batches_to_limit_memory(
    digits: Dataset, recipe: Recipe, side_px: int, size: int
) -> None:
    spec = replace(digits.preprocess, width_px=side_px, height_px=side_px)
    steps = plan_steps(
        replace(recipe, batch_size=None), replace(some_of(digits, 1200), preprocess=spec)
    )
    assert steps.batch_size == size


@pytest.mark.parametrize("count", [3, 33, 63, 65])
def test_an_epoch_uses_every_picture_once(
    digits: Dataset, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    data = some_of(digits, count)
    seen: list[torch.Tensor] = []
    original = augment_pixels

    def augment(pixels: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.append(pixels.clone())
        return original(pixels, *others)

    monkeypatch.setattr(loop, "augment", augment)
    fit(replace(recipe, epochs=1, batch_size=32), data, CPU, 0)
    shown = sorted(picture.numpy().tobytes() for picture in torch.cat(seen))
    assert shown == sorted(picture.tobytes() for picture in data.train.pixels)
    assert min(len(batch) for batch in seen) >= 2


def test_too_few_steps_are_reported_before_training(
    digits: Dataset, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    announce_steps(replace(recipe, epochs=30), some_of(digits, 10))
    assert "10 training pictures in batches of 10: 1 steps an epoch, 30 in 30" in caplog.text
    assert "too few to learn much: add pictures, or train longer, for example" in caplog.text
    assert "--set epochs=200" in caplog.text
    caplog.clear()
    announce_steps(replace(recipe, epochs=30), digits)
    assert "too few" not in caplog.text


def test_among_equally_accurate_epochs_the_one_with_the_lowest_loss_is_kept(
    few_digits: Dataset, recipe: Recipe
) -> None:
    """Validates on a single picture, so that most epochs are equally accurate."""
    data = replace(few_digits, validation=take(few_digits.validation, np.arange(1)))
    trained = fit(replace(recipe, epochs=8), data, CPU, 0)
    equal = [
        e for e in trained.history if e.validation_accuracy == trained.best.validation_accuracy
    ]
    assert trained.best.validation_loss == min(epoch.validation_loss for epoch in equal)


def test_early_stopping_is_on_by_default_and_can_be_turned_off(
    few_digits: Dataset, recipe: Recipe
) -> None:
    stuck = replace(recipe, epochs=13, learning_rate=1e-12)
    assert len(fit(stuck, few_digits, CPU, 0).history) == 11
    assert len(fit(replace(stuck, patience_epochs=0), few_digits, CPU, 0).history) == 13


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA")
def test_training_learns_on_the_gpu(few_digits: Dataset, recipe: Recipe) -> None:
    trained = fit(replace(recipe, epochs=10), few_digits, torch.device("cuda"), seed=0)
    assert trained.best.validation_accuracy > 0.6
