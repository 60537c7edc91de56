"""The training loop: one function to read from top to bottom.

It knows tensors and recipes. Other modules load data and write to MLflow, reports and bundles.
The same seed and data on the same machine give the same weights, even if the run was interrupted
and resumed, because every epoch has its own random generator, seeded by (seed, epoch).
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from msgspec import Struct
from torch import Generator, Tensor
from torch.nn import functional
from tqdm import tqdm

from registry.core.errors import UsageError
from registry.model.preprocessed_model import PreprocessedModel, build_preprocessed
from training.data.sources import Dataset, Examples
from training.fitting.augment import augment
from training.fitting.checkpoint import load_checkpoint, run_key, save_checkpoint
from training.fitting.recipes import Recipe
from training.fitting.steps import Steps, plan_steps

log = logging.getLogger(__name__)


class Epoch(Struct, frozen=True, kw_only=True):
    """Mean losses and accuracies of one epoch; ``seconds`` is the time without validation."""

    number: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    seconds: float


class Trained(Struct, frozen=True, kw_only=True):
    """The model with the weights of its best epoch, and the metrics of every epoch."""

    preprocessed: PreprocessedModel
    history: tuple[Epoch, ...]
    best: Epoch
    interrupted: bool


def fit(
    recipe: Recipe,
    data: Dataset,
    device: torch.device,
    seed: int,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Trained:
    """Train ``recipe`` on ``data.train`` and keep the epoch that does best on ``data.validation``.

    The test pictures are not used. Ctrl-C ends the training and keeps the best epoch so far. Before
    the end of the first epoch there is none, and ``KeyboardInterrupt`` is raised.

    Args:
        recipe: what to train and how.
        data: pixels and labels; the training pictures are copied to ``device`` once.
        device: where to train.
        seed: of the weights, the order of the pictures and the augmentation.
        checkpoint: file that is rewritten after each epoch; None saves no checkpoint.
        resume: continue from ``checkpoint``.
        on_epoch: called after each epoch, for tracking.

    Raises:
        UsageError: ``resume`` is set and there is no checkpoint of this run, or the loss is not
            finite.
        NetworkImpossible: the recipe's network does not fit the pictures.
    """
    torch.manual_seed(seed)
    preprocessed = build_preprocessed(recipe.network, data.preprocess, len(data.labels)).to(device)
    optimizer = _optimizer(recipe, preprocessed)
    steps = plan_steps(recipe, data)
    train = _to_device(data.train, device)
    history: list[Epoch] = []
    best: Epoch | None = None
    best_weights: dict[str, Tensor] = {}
    interrupted = False

    key = run_key(recipe, data, seed)
    if resume:
        state = load_checkpoint(checkpoint, key)
        preprocessed.network.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        best_weights = state["best_weights"]
        history = [msgspec.convert(epoch, Epoch) for epoch in state["history"]]
        best = max(history, key=_quality)

    try:
        while len(history) < recipe.epochs and not _is_stuck(recipe, history):
            number = len(history) + 1
            epoch = train_epoch(
                number, recipe, preprocessed, optimizer, steps, train, data.validation, seed
            )
            if best is None or _quality(epoch) > _quality(best):
                best_weights = {
                    name: tensor.clone()
                    for name, tensor in preprocessed.network.state_dict().items()
                }
                best = epoch
            history.append(epoch)
            if checkpoint is not None:
                save_checkpoint(
                    checkpoint,
                    {
                        "key": key,
                        "weights": preprocessed.network.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "best_weights": best_weights,
                        "history": [msgspec.to_builtins(each) for each in history],
                    },
                )
            on_epoch(epoch)
            log.info(
                "epoch %d: validation accuracy %.4f (best %.4f in epoch %d)",
                number,
                epoch.validation_accuracy,
                best.validation_accuracy,
                best.number,
            )
    except KeyboardInterrupt:
        if best is None:
            raise
        log.warning("interrupted: keeping epoch %d", best.number)
        interrupted = True

    assert best is not None  # at least one epoch ran, or was resumed
    preprocessed.network.load_state_dict(best_weights)
    return Trained(
        preprocessed=preprocessed.eval(), history=tuple(history), best=best, interrupted=interrupted
    )


def train_epoch(  # noqa: PLR0913 - the state of the loop
    number: int,
    recipe: Recipe,
    preprocessed: PreprocessedModel,
    optimizer: torch.optim.Optimizer,
    steps: Steps,
    train: tuple[Tensor, Tensor],
    validation: Examples,
    seed: int,
) -> Epoch:
    """Train on every picture once, in an order that (seed, number) decides, and validate.

    Args:
        number: of the epoch, from 1.
        recipe: augmentation, precision.
        preprocessed: the model; changed in place.
        optimizer: of the model's parameters.
        steps: batches and learning rate.
        train: pixels uint8 (N, H, W, C) and labels int64 (N,), on the model's device.
        validation: the pictures to validate on.
        seed: of the run.

    Raises:
        UsageError: the loss is not finite.
    """
    pixels, labels = train
    device = labels.device
    generator = Generator().manual_seed(seed * 1_000_003 + number)
    torch.manual_seed(seed * 1_000_003 + number)  # dropout draws from the global generator
    order = torch.randperm(len(labels), generator=generator).to(device)
    # Batches of nearly equal size: batch norm cannot normalise over a small last batch.
    batches = order.tensor_split(steps.per_epoch)
    use_bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and _has_bf16(device))
    loss_sum = torch.zeros((), device=device)
    correct = torch.zeros((), device=device)
    started = time.perf_counter()
    preprocessed.train()
    seen = 0
    with tqdm(total=len(labels), unit="img", desc=f"epoch {number}", disable=None) as bar:
        for step, chosen in enumerate(batches):
            batch = augment(pixels[chosen], recipe, generator)
            rate = _learning_rate(recipe, steps, (number - 1) * steps.per_epoch + step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16):
                logits, _ = preprocessed(batch)
            loss = functional.cross_entropy(
                logits.float(), labels[chosen], label_smoothing=recipe.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch 2.13 leaves it untyped
            optimizer.step()
            loss_sum += loss.detach() * len(chosen)
            correct += (logits.argmax(1) == labels[chosen]).sum()
            seen += len(chosen)
            if step % 50 == 49 or step == steps.per_epoch - 1:  # .item() waits for the GPU
                bar.n = seen
                bar.set_postfix(
                    loss=f"{loss_sum.item() / seen:.3f}",
                    accuracy=f"{correct.item() / seen:.4f}",
                )
    seconds = time.perf_counter() - started
    train_loss = loss_sum.item() / seen
    if not math.isfinite(train_loss):
        raise UsageError(
            f"epoch {number}: the loss is not finite; try a lower learning rate, for example "
            f"--set learning_rate={recipe.learning_rate / 10:.2g}"
        )
    validation_loss, validation_accuracy = validate(preprocessed, validation, device)
    return Epoch(
        number=number,
        train_loss=train_loss,
        train_accuracy=correct.item() / seen,
        validation_loss=validation_loss,
        validation_accuracy=validation_accuracy,
        learning_rate=rate,
        seconds=seconds,
    )


@torch.inference_mode()
def validate(
    preprocessed: PreprocessedModel, examples: Examples, device: torch.device
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of ``preprocessed`` on ``examples``, in fp32."""
    preprocessed.eval()
    loss_sum, correct = 0.0, 0
    for start in range(0, len(examples), 500):
        pixels = torch.from_numpy(examples.pixels[start : start + 500]).to(device)
        labels = torch.from_numpy(examples.labels[start : start + 500]).to(device)
        logits, _ = preprocessed(pixels)
        loss_sum += functional.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(1) == labels).sum())
    return loss_sum / len(examples), correct / len(examples)


def _optimizer(recipe: Recipe, preprocessed: PreprocessedModel) -> torch.optim.Optimizer:
    """The recipe's optimiser; it decays matrices and kernels, but not biases and norms."""
    decayed = [p for p in preprocessed.parameters() if p.ndim > 1]
    plain = [p for p in preprocessed.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate)
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)


def _learning_rate(recipe: Recipe, steps: Steps, step: int) -> float:
    """Linear warm-up, then half a cosine to zero; depends on the step alone, so runs can resume."""
    warmup = max(1, round(recipe.warmup_share * steps.total))
    if step < warmup:
        return steps.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps.total - warmup)
    return steps.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _has_bf16(device: torch.device) -> bool:
    """Whether ``device`` computes bf16 natively; training was then 1.7 to 2.3 times as fast."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    cpu = torch.cpu  # there is no public call
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())  # noqa: SLF001


def _to_device(examples: Examples, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.from_numpy(np.ascontiguousarray(examples.pixels)).to(device),
        torch.from_numpy(examples.labels).to(device),
    )


def _quality(epoch: Epoch) -> tuple[float, float]:
    """The sort key of epochs: accuracy, then loss, as few pictures often give equal accuracies."""
    return epoch.validation_accuracy, -epoch.validation_loss


def _is_stuck(recipe: Recipe, history: list[Epoch]) -> bool:
    """Whether accuracy has not risen for ``recipe.patience_epochs`` epochs.

    ``fit`` checks it before each epoch, so a resumed run also stops.
    """
    if not recipe.patience_epochs or not history:
        return False
    peak = max(history, key=lambda epoch: epoch.validation_accuracy)
    stuck = len(history) - peak.number >= recipe.patience_epochs
    if stuck:
        log.info(
            "no better accuracy for %d epochs: stopping early; --set patience_epochs=0 prevents it",
            recipe.patience_epochs,
        )
    return stuck
