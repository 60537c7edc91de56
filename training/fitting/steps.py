"""Decides how many pictures an optimiser step takes, and how many steps a training has."""

import logging

from msgspec import Struct

from training.data.sources import Dataset
from training.fitting.recipes import Recipe

log = logging.getLogger(__name__)

# The learning rate in a recipe for SGD assumes batches of this size.
LARGEST_BATCH = 128
SMALLEST_BATCH = 8
# 32 pictures of 224×224: the feature maps of a ResNet-18 then take at most 2 GB.
LARGEST_BATCH_PIXELS = 32 * 224 * 224
MIN_STEPS_PER_EPOCH = 20
# With fewer steps no recipe learnt well: 30 epochs of one step each were as accurate as a coin.
FEW_STEPS = 200


class Steps(Struct, frozen=True):
    """The steps of one training.

    Attributes:
        batch_size: pictures in a step, at most; batches of an epoch differ by at most one picture.
        per_epoch: steps in an epoch; together they use every picture once.
        total: steps in all epochs.
        learning_rate: the highest learning rate of the schedule.
    """

    batch_size: int
    per_epoch: int
    total: int
    learning_rate: float


def plan_steps(recipe: Recipe, data: Dataset) -> Steps:
    """The steps of ``recipe`` on ``data``.

    If the recipe has no batch size, small data sets get small batches: an epoch has at least 20
    steps, unless that needs a batch smaller than 8. SGD's learning rate is then scaled in
    proportion to the batch (Goyal et al. 2017, arXiv:1706.02677). AdamW's is not scaled. On 160
    digits, AdamW reached an accuracy of 0.82 unscaled, and of 0.77 when scaled by the square root
    of the batch; ``resnet`` with SGD reached 0.76 in proportion and 0.62 unscaled.
    """
    count = len(data.train)
    rate = recipe.learning_rate
    batch = recipe.batch_size
    if batch is None:
        height_px, width_px, _ = data.preprocess.shape
        batch = _batch_for(count, height_px * width_px)
        rate *= batch / LARGEST_BATCH if recipe.optimizer == "sgd" else 1
    # At least two pictures in each batch: batch norm cannot normalise over one.
    per_epoch = max(1, min(-(-count // batch), count // 2))
    return Steps(-(-count // per_epoch), per_epoch, per_epoch * recipe.epochs, rate)


def announce_steps(recipe: Recipe, data: Dataset) -> None:
    """Log how many steps the training will have, and warn if they are too few to learn much."""
    steps = plan_steps(recipe, data)
    log.info(
        "%s: %d training pictures in batches of %d: %d steps an epoch, %d in %d epochs; "
        "highest learning rate %.2g",
        *(
            recipe.name,
            len(data.train),
            steps.batch_size,
            steps.per_epoch,
            steps.total,
            recipe.epochs,
        ),
        steps.learning_rate,
    )
    if steps.total < FEW_STEPS:
        log.warning(
            "%d optimiser steps are too few to learn much: add pictures, or train longer, for "
            "example with --set epochs=%d",
            *(steps.total, -(-FEW_STEPS // steps.per_epoch)),
        )


def _batch_for(count: int, picture_px: int) -> int:
    """The batch size for ``count`` pictures, a power of two."""
    largest = min(LARGEST_BATCH, LARGEST_BATCH_PIXELS // picture_px)
    wanted = max(SMALLEST_BATCH, count // MIN_STEPS_PER_EPOCH)
    # Two, even of the largest pictures: batch norm cannot normalise over one.
    wanted = max(2, min(wanted, largest))
    return 1 << (wanted.bit_length() - 1)
