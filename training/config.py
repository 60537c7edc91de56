"""Recipes: everything about a training run that is not the data, as one immutable record."""

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from registry.contract import NetworkSpec
from registry.errors import UsageError

PositiveInt = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, lt=1)]


class Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train one network.

    Augmentation: ``flip`` mirrors half of the pictures, ``crop_px`` pads by that many pixels on
    every side and cuts out the original size at random, ``erase`` blanks a random rectangle in that
    share of the pictures. ``precision`` ``auto`` takes bf16 autocast where the device computes it
    natively, which is decided by capability and not by timing, so that a run can be repeated.
    """

    name: str
    network: NetworkSpec
    epochs: PositiveInt
    optimizer: Literal["adamw", "sgd"] = "adamw"
    batch_size: PositiveInt = 128
    learning_rate: Annotated[float, Meta(gt=0)] = 2e-3
    weight_decay: Annotated[float, Meta(ge=0)] = 1e-2
    warmup_share: Share = 0.1
    label_smoothing: Share = 0.0
    flip: bool = False
    crop_px: Annotated[int, Meta(ge=0)] = 0
    erase: Annotated[float, Meta(ge=0, le=1)] = 0.0
    patience_epochs: PositiveInt | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="dense", network=NetworkSpec("dense"), epochs=12),
        Recipe(name="cnn", network=NetworkSpec("cnn", {"dropout": 0.4}), epochs=14),
        Recipe(
            name="resnet",
            network=NetworkSpec("resnet"),
            epochs=30,
            optimizer="sgd",
            learning_rate=0.1,
            weight_decay=5e-4,
            warmup_share=0.2,
            label_smoothing=0.05,
            flip=True,
            crop_px=2,
            erase=0.5,
        ),
        # The paper's ResNet-18, for photographs of 100 px and more.
        Recipe(
            name="resnet18",
            network=NetworkSpec(
                "resnet", {"stem": "large", "widths": [64, 128, 256, 512], "blocks": 2}
            ),
            epochs=30,
            batch_size=32,
            optimizer="sgd",
            learning_rate=0.02,
            weight_decay=5e-4,
            warmup_share=0.2,
            label_smoothing=0.05,
            flip=True,
            crop_px=16,
        ),
    )
}


def choose_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe ``name`` with ``KEY=VALUE`` overrides.

    A key is a field of ``Recipe`` (``epochs=3``) or else an argument of its network
    (``filters=32,64``, ``pooling=average``).

    Raises:
        UsageError: no recipe of that name, an override without ``=``, or a value that cannot be.
    """
    if name not in RECIPES:
        raise UsageError(f"there is no recipe {name!r}; there are: {', '.join(RECIPES)}")
    fields = msgspec.to_builtins(RECIPES[name])
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UsageError(f"{override!r} is no override; write KEY=VALUE, for example epochs=3")
        target = fields if key in fields and key not in ("name", "network") else None
        (fields["network"]["args"] if target is None else target)[key] = _parse_value(text)
    try:
        return msgspec.convert(fields, Recipe)
    except msgspec.ValidationError as error:
        raise UsageError(f"recipe {name}: {error}") from error


def _parse_value(text: str) -> Any:
    """JSON where it is JSON; ``a,b`` a list; anything else the string itself."""
    if "," in text and not text.lstrip().startswith("["):
        return [_parse_value(part) for part in text.split(",") if part]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
