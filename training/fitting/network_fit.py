"""Chooses defaults of a network that fit the pictures: small pictures allow fewer poolings."""

from typing import Any

import msgspec
import torch

from registry.core.errors import NetworkImpossible
from registry.model.manifest import ListedNetwork
from registry.model.networks import build_network
from training.fitting.recipes import Recipe


def fit_to_pictures(recipe: Recipe, side_px: int) -> Recipe:
    """``recipe`` with a ``padding`` and ``pool_size`` that fit, if it is a ``cnn`` without them.

    Args:
        recipe: the recipe that the user chose; arguments that it names are not changed.
        side_px: height and width of the pictures.

    Raises:
        NetworkImpossible: no default fits the pictures, or an argument of the recipe is invalid.
    """
    network = recipe.network
    for defaults in ({}, *(_small_picture_defaults(network, side_px))):
        args = {**defaults, **network.args}
        try:
            with torch.device("meta"):  # takes no memory
                build_network(network.name, (3, side_px, side_px), 2, **args)
        except NetworkImpossible as error:
            impossible = error
            continue
        return msgspec.structs.replace(recipe, network=ListedNetwork(network.name, args))
    raise impossible


def _small_picture_defaults(network: ListedNetwork, side_px: int) -> list[dict[str, Any]]:
    """Further defaults to try, the smallest change first."""
    if network.name != "cnn":
        return []
    filters = network.args.get("filters", (32, 64))
    kernel = network.args.get("kernel_size", 3)
    depth = len(filters) if isinstance(filters, list | tuple) else 1
    kernels = kernel if isinstance(kernel, list) else [kernel] * depth
    if not all(type(each) is int for each in kernels):
        return []
    padded = {"padding": [each // 2 for each in kernels]}
    return [
        padded,
        {**padded, "pool_size": [2 if side_px >> layer >= 2 else 1 for layer in range(depth)]},
    ]
