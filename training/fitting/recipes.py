"""Recipes: all settings of a training run except the data and the seed, as an immutable record."""

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from registry.core.errors import UsageError
from registry.model.manifest import ListedNetwork
from training.fitting.parameters import TRAINING, describe_unknown, find_parameter

PositiveInt = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, lt=1)]


class Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train one network.

    Augmentation: ``flip`` mirrors half of the pictures. ``crop_px`` pads by that many pixels on
    every side and cuts out the original size at random. ``erase`` fills a random rectangle with
    noise in that share of the pictures.

    ``precision`` ``auto`` uses bf16 autocast if the device computes bf16 natively. It asks for the
    device's capability and times nothing, so that a run can be repeated.
    ``training.fitting.parameters`` explains every field. It has many fields because each is a
    parameter that users may set.
    """

    name: str
    network: ListedNetwork
    epochs: PositiveInt
    optimizer: Literal["adamw", "sgd"] = "adamw"
    batch_size: Annotated[int, Meta(ge=2)] | None = None
    learning_rate: Annotated[float, Meta(gt=0)] = 2e-3
    weight_decay: Annotated[float, Meta(ge=0)] = 1e-2
    warmup_share: Share = 0.1
    label_smoothing: Share = 0.0
    flip: bool = False
    crop_px: Annotated[int, Meta(ge=0)] = 0
    erase: Annotated[float, Meta(ge=0, le=1)] = 0.0
    patience_epochs: Annotated[int, Meta(ge=0)] = 10
    precision: Literal["auto", "fp32", "bf16"] = "auto"


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="dense", network=ListedNetwork("dense"), epochs=12),
        Recipe(name="cnn", network=ListedNetwork("cnn", {"dropout": 0.4}), epochs=14),
        Recipe(
            name="resnet",
            network=ListedNetwork("resnet"),
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
        # The ResNet-18 of the paper, for photographs of 100 px and more.
        Recipe(
            name="resnet18",
            network=ListedNetwork(
                "resnet", {"stem": "large", "widths": [64, 128, 256, 512], "blocks": 2}
            ),
            epochs=30,
            optimizer="sgd",
            learning_rate=0.08,
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

    A key is a field of ``Recipe`` (``epochs=3``) or an argument of its network
    (``filters=32,64``, ``pooling=average``); ``training.fitting.parameters`` lists all keys.

    Raises:
        UsageError: there is no recipe of that name, an override has no ``=``, its key is unknown,
            or its value is invalid.
    """
    if name not in RECIPES:
        raise UsageError(f"there is no recipe {name!r}; there are: {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UsageError(
                f"--set {override}: write KEY=VALUE, for example {TRAINING[0].setting}"
            )
        recipe = _override(recipe, key, text)
    return recipe


def _override(recipe: Recipe, key: str, text: str) -> Recipe:
    parameter = find_parameter(key, recipe.network.name)
    if parameter is None:
        raise UsageError(f"--set {key}={text}: {describe_unknown(key, recipe.network.name)}")
    fields = msgspec.to_builtins(recipe)
    target = fields if parameter in TRAINING else fields["network"]["args"]
    target[key] = _parse_value(text)
    try:
        return msgspec.convert(fields, Recipe)
    except msgspec.ValidationError as error:
        reason = str(error).partition(" - at")[0]
        raise UsageError(
            f"--set {key}={text}: {reason} (for example {parameter.setting})"
        ) from error


def _parse_value(text: str) -> Any:
    """The value of ``text``: JSON if it parses, a list for ``a,b``, or else the string itself."""
    if "," in text and not text.lstrip().startswith("["):
        return [_parse_value(part) for part in text.split(",") if part]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
