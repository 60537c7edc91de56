"""Builds the networks that a bundle may name, from plain arguments.

A bundle holds a name and arguments, never code, so only the networks of this list can run. Every
builder first computes the shapes of its layers. The error for an impossible network therefore names
the layer that does not fit and an argument that would, instead of coming from inside a kernel.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional

from registry.core.errors import NetworkImpossible, UsageError

Option = TypeVar("Option")

Shape = tuple[int, int, int]
"""(channels, height, width) of one example."""

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
POOLINGS: dict[str, type[nn.MaxPool2d] | type[nn.AvgPool2d]] = {
    "max": nn.MaxPool2d,
    "average": nn.AvgPool2d,
}


def dense(
    shape: Shape, classes: int, *, hidden: Sequence[int] = (128,), activation: str = "relu"
) -> nn.Sequential:
    """Flatten → ``hidden`` units → classes: a baseline that ignores which pixels are neighbours."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    width = shape[0] * shape[1] * shape[2]
    for number, units in enumerate(_sizes("hidden", hidden), start=1):
        layers[f"dense{number}"] = nn.Linear(width, units)
        layers[f"activation{number}"] = _choose("activation", activation, ACTIVATIONS)()
        width = units
    layers["logits"] = nn.Linear(width, classes)
    return nn.Sequential(layers)


def cnn(  # noqa: PLR0913 - keyword-only hyper-parameters
    shape: Shape,
    classes: int,
    *,
    filters: Sequence[int] = (32, 64),
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    pooling: str = "max",
    pool_size: int | Sequence[int] = 2,
    activation: str = "relu",
    hidden: int = 128,
    dropout: float = 0.0,
) -> nn.Sequential:
    """For each of ``filters``: convolution → activation → pooling. Then ``hidden`` → classes.

    A number for ``kernel_size``, ``stride``, ``padding`` or ``pool_size`` applies to every
    convolution; a list has one number for each. ``pool_size`` 1 leaves the pooling out.
    """
    filters = _sizes("filters", filters)
    depth = len(filters)
    kernels = _per_layer("kernel_size", kernel_size, depth, least=1)
    strides = _per_layer("stride", stride, depth, least=1)
    paddings = _per_layer("padding", padding, depth, least=0)
    pools = _per_layer("pool_size", pool_size, depth, least=1)
    if not 0 <= dropout < 1:
        raise NetworkImpossible(
            f"dropout is {dropout}; it must be at least 0 and below 1", "dropout=0.3"
        )

    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, height, width = shape
    for index, count in enumerate(filters):
        number, kernel, pad, pool = index + 1, kernels[index], paddings[index], pools[index]
        _check_kernel(f"conv{number}", "kernel_size", kernels, index, (height, width), pad)
        layers[f"conv{number}"] = nn.Conv2d(channels, count, kernel, strides[index], pad)
        layers[f"activation{number}"] = _choose("activation", activation, ACTIVATIONS)()
        channels = count
        height = (height + 2 * pad - kernel) // strides[index] + 1
        width = (width + 2 * pad - kernel) // strides[index] + 1
        if pool > 1:
            _check_kernel(f"pool{number}", "pool_size", pools, index, (height, width), 0)
            layers[f"pool{number}"] = _choose("pooling", pooling, POOLINGS)(pool)
            height, width = height // pool, width // pool
    layers["flatten"] = nn.Flatten()
    layers["dense"] = nn.Linear(channels * height * width, _sizes("hidden", hidden)[0])
    layers["dense_activation"] = _choose("activation", activation, ACTIVATIONS)()
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    layers["logits"] = nn.Linear(hidden, classes)
    return nn.Sequential(layers)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2016, https://arxiv.org/abs/1512.03385)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's maps, none below 0: (N, channels_out, ⌈height / stride⌉, ⌈width / stride⌉).

        Args:
            x: maps (N, channels_in, height, width), of the weights' dtype.
        """
        inner = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def _small_stem(channels: int, width: int) -> dict[str, nn.Module]:
    return {
        "conv1": nn.Conv2d(channels, width, 3, 1, 1, bias=False),
        "norm1": nn.BatchNorm2d(width),
        "activation1": nn.ReLU(),
    }


def _large_stem(channels: int, width: int) -> dict[str, nn.Module]:
    return {
        "conv1": nn.Conv2d(channels, width, 7, 2, 3, bias=False),
        "norm1": nn.BatchNorm2d(width),
        "activation1": nn.ReLU(),
        "pool1": nn.MaxPool2d(3, 2, 1),
    }


STEMS = {"small": _small_stem, "large": _large_stem}


def resnet(
    shape: Shape,
    classes: int,
    *,
    widths: Sequence[int] = (32, 64, 128),
    blocks: int | Sequence[int] = 1,
    stem: str = "small",
) -> nn.Sequential:
    """A residual network: a stem, then one stage of ``blocks`` blocks for each of ``widths``.

    Every stage after the first halves the height and the width of the maps. The ``small`` stem is
    one 3×3 convolution. The ``large`` stem, for pictures of 100 px and more, is a 7×7 convolution
    with stride 2 and a pooling. With it, widths 64, 128, 256, 512 and 2 blocks give the paper's
    ResNet-18.
    """
    widths = _sizes("widths", widths)
    depths = _per_layer("blocks", blocks, len(widths), least=1)
    if sum(depths) > MAX_LAYERS:
        raise NetworkImpossible(
            f"blocks is {blocks!r}; a network has at most {MAX_LAYERS} blocks", "blocks=2"
        )
    opening = _choose("stem", stem, STEMS)(shape[0], widths[0])
    smallest = min(shape[1:]) if stem == "small" else (min(shape[1:]) + 3) // 4
    if smallest < 2 ** (len(widths) - 1):
        raise NetworkImpossible(
            f"widths has {len(widths)} stages and halves the map {len(widths) - 1} times, but the "
            f"input is {shape[1]}×{shape[2]}: at most {smallest.bit_length()} stages fit a "
            f"{stem} stem",
            f"widths={_listed(widths[: smallest.bit_length()])}",
        )
    layers = OrderedDict(opening)
    for stage, (before, width) in enumerate(pairwise((widths[0], *widths)), start=1):
        for block in range(1, depths[stage - 1] + 1):
            first = block == 1
            stride = 2 if first and stage > 1 else 1
            layers[f"stage{stage}_block{block}"] = ResidualBlock(
                before if first else width, width, stride
            )
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["logits"] = nn.Linear(widths[-1], classes)
    return nn.Sequential(layers)


MAX_LAYERS = 1000
NETWORKS: dict[str, Callable[..., nn.Sequential]] = {"dense": dense, "cnn": cnn, "resnet": resnet}


def build_network(name: str, shape: Shape, classes: int, /, **args: Any) -> nn.Sequential:
    """The network ``name`` with random weights.

    Args:
        name: one of ``NETWORKS``.
        shape: (channels, height, width) of one example.
        classes: number of labels, and so of logits.
        **args: the builder's own arguments.

    Returns:
        A sequence of modules from float32 (N, C, H, W) to logits float32 (N, classes). The last
        module is a linear layer; its input is the features (N, D).

    Raises:
        UsageError: there is no network of that name.
        NetworkImpossible: an argument is unknown or impossible, or a layer does not fit its input.
    """
    if name not in NETWORKS:
        raise UsageError(f"there is no network {name!r}; use one of: {', '.join(NETWORKS)}")
    builder = NETWORKS[name]
    known = list(inspect.signature(builder).parameters)[2:]
    if unknown := sorted(set(args) - set(known)):
        raise NetworkImpossible(
            f"{name} takes no argument {', '.join(unknown)}; it takes: {', '.join(known)}"
        )
    try:
        return builder(shape, classes, **args)
    except (TypeError, ValueError) as error:
        raise NetworkImpossible(f"{name} cannot be built from {args}: {error}") from error


def _check_kernel(
    layer: str, name: str, sizes: list[int], index: int, map_size: tuple[int, int], pad: int
) -> None:
    """Refuse ``sizes[index]``, the argument ``name`` of ``layer``, if it does not fit the map."""
    size, smallest = sizes[index], min(map_size) + 2 * pad
    if size <= smallest:
        return
    advice, suggestion = "fewer or smaller layers", ""
    if smallest >= 1:
        advice = f"{name} of at most {smallest}"
        suggestion = f"{name}={_listed([*sizes[:index], smallest, *sizes[index + 1 :]])}"
    if name == "kernel_size":
        advice += f", or padding of at least {pad + -(-(size - smallest) // 2)},"
    raise NetworkImpossible(
        f"{layer}: a window of {size}×{size} does not fit its input of "
        f"{map_size[0]}×{map_size[1]} (padding {pad}); {advice} would",
        suggestion,
    )


def _sizes(name: str, values: int | Sequence[int]) -> list[int]:
    sizes: list[int] = [values] if isinstance(values, int) else list(values)
    if len(sizes) > MAX_LAYERS:
        raise NetworkImpossible(f"{name} has {len(sizes)} values; give at most {MAX_LAYERS}")
    if not sizes or not all(type(size) is int and size >= 1 for size in sizes):
        raise NetworkImpossible(
            f"{name} is {values!r}; it must be whole numbers of at least 1", f"{name}=32"
        )
    return sizes


def _per_layer(name: str, value: int | Sequence[int], depth: int, least: int) -> list[int]:
    values: list[int] = [value] * depth if isinstance(value, int) else list(value)
    if len(values) != depth:
        raise NetworkImpossible(
            f"{name} has {len(values)} values for {depth} layers; give one, or one for each",
            f"{name}={_listed((values or [1])[:1] * depth)}",
        )
    if not all(type(each) is int and each >= least for each in values):
        raise NetworkImpossible(
            f"{name} is {value!r}; it must be whole numbers of at least {least}",
            f"{name}={max(1, least)}",
        )
    return values


def _choose(name: str, value: str, choices: dict[str, Option]) -> Option:
    if value not in choices:
        raise NetworkImpossible(
            f"{name} is {value!r}; it must be one of: {', '.join(choices)}",
            f"{name}={next(iter(choices))}",
        )
    return choices[value]


def _listed(values: Sequence[int]) -> str:
    return ",".join(str(value) for value in values)
