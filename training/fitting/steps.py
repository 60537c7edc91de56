"""How many pictures an optimiser step takes, and how many steps that makes."""

import logging

from msgspec import Struct

from training.data.sources import Dataset
from training.fitting.recipes import Recipe

log = logging.getLogger(__name__)

# A recipe's learning rate for SGD is meant for a batch of this size.
LARGEST_BATCH = 128
SMALLEST_BATCH = 8
# 32 pictures of 224×224: what their feature maps take stays within 2 GB for a ResNet-18.
LARGEST_BATCH_PIXELS = 32 * 224 * 224
MIN_STEPS_PER_EPOCH = 20
# Below it, no recipe learnt what it can: 30 epochs of one step each gave a coin's accuracy.
FEW_STEPS = 200


class Steps(Struct, frozen=True):
    """The steps of one training.

    Attributes:
        batch_size: pictures in a step, at most; batches of an epoch differ by one at most.
        per_epoch: steps in an epoch; together they show every picture once.
        total: steps in all epochs.
        learning_rate: the highest one.
    """

    batch_size: int
    per_epoch: int
    total: int
    learning_rate: float


def plan_steps(recipe: Recipe, data: Dataset) -> Steps:
    """The steps of ``recipe`` on ``data``.

    Without a batch size in the recipe, small data gets small batches, so that an epoch has at
    least 20 steps where a batch of 8 allows. SGD's learning rate follows in proportion (Goyal et
    al. 2017, arXiv:1706.02677). AdamW's does not: on 160 digits it learnt 0.82 unchanged and 0.77
    by the square root of the batch; ``resnet`` by SGD 0.76 in proportion and 0.62 unchanged.
    """
    count = len(data.train)
    rate = recipe.learning_rate
    batch = recipe.batch_size
    if batch is None:
        height_px, width_px, _ = data.preprocess.shape
        batch = _batch_for(count, height_px * width_px)
        rate *= batch / LARGEST_BATCH if recipe.optimizer == "sgd" else 1
    # At least two pictures in each: batch norm cannot normalise over one.
    per_epoch = max(1, min(-(-count // batch), count // 2))
    return Steps(-(-count // per_epoch), per_epoch, per_epoch * recipe.epochs, rate)


def announce_steps(recipe: Recipe, data: Dataset) -> None:
    """Say how many steps the training will have, and warn of too few to learn."""
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
    """A power of two."""
    largest = min(LARGEST_BATCH, LARGEST_BATCH_PIXELS // picture_px)
    wanted = max(SMALLEST_BATCH, count // MIN_STEPS_PER_EPOCH)
    # Two even of the largest pictures: batch norm cannot normalise over one.
    wanted = max(2, min(wanted, largest))
    return 1 << (wanted.bit_length() - 1)
