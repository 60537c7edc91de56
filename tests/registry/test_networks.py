from typing import Any

import pytest
import torch

from registry.core.errors import NetworkImpossible, UsageError
from registry.model.manifest import ListedNetwork, PreprocessSpec
from registry.model.networks import NETWORKS, build_network
from registry.model.preprocessed_model import build_preprocessed

SHAPE = (1, 28, 28)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("dense", {}),
        ("dense", {"hidden": [32, 16], "activation": "gelu"}),
        ("cnn", {}),
        ("cnn", {"filters": [8], "kernel_size": 5, "stride": 2, "padding": 2}),
        ("cnn", {"filters": [8, 8, 8], "kernel_size": [5, 3, 1], "pool_size": [2, 1, 3]}),
        ("cnn", {"pooling": "average", "activation": "tanh", "hidden": 32, "dropout": 0.5}),
        ("resnet", {}),
        ("resnet", {"widths": [8, 16], "blocks": [2, 1]}),
    ],
)
def test_every_network_maps_pictures_to_logits(name: str, args: dict[str, object]) -> None:
    network = build_network(name, SHAPE, 10, **args).eval()
    assert network(torch.zeros(3, *SHAPE)).shape == (3, 10)


def test_the_default_cnn_has_two_convolutions_and_two_linear_layers() -> None:
    layers = [type(layer).__name__ for layer in build_network("cnn", SHAPE, 10)]
    assert layers == [
        *("Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "MaxPool2d"),
        *("Flatten", "Linear", "ReLU", "Linear"),
    ]
    network: Any = build_network("cnn", SHAPE, 10)
    assert (network.conv1.out_channels, network.conv2.out_channels) == (32, 64)
    assert network.conv1.kernel_size == (3, 3)
    assert network.dense.out_features == 128


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("cnn", {"kernel_size": 29}, r"conv1: a window of 29×29 .* 28×28 .* at most 28.* padding"),
        ("cnn", {"filters": [8] * 5}, r"conv4: .* 1×1"),
        ("cnn", {"pool_size": 27}, r"pool1: a window of 27×27 .* 26×26 .* at most 26"),
        ("cnn", {"stride": 0}, "stride is 0"),
        ("cnn", {"padding": [1]}, "padding has 1 values for 2 layers"),
        ("cnn", {"filters": []}, "filters"),
        ("cnn", {"filters": ["a"]}, "filters"),
        ("cnn", {"pooling": "median"}, "one of: max, average"),
        ("cnn", {"activation": "swoosh"}, "one of: relu"),
        ("cnn", {"dropout": 1}, "below 1"),
        ("cnn", {"colour": "red"}, "takes no argument colour; it takes: filters"),
        ("cnn", {"classes": 3, "name": "x"}, "takes no argument classes, name"),
        ("dense", {"hidden": [0]}, "hidden"),
        ("dense", {"hidden": None}, "cannot be built"),
        ("resnet", {"widths": [8] * 7}, "at most 5 stages"),
    ],
)
def test_an_impossible_network_is_refused_and_the_error_says_what_would_fit(
    name: str, args: dict[str, object], reason: str
) -> None:
    with pytest.raises(NetworkImpossible, match=reason):
        build_network(name, SHAPE, 10, **args)


def test_an_unknown_network_is_refused_and_the_error_lists_all_networks() -> None:
    with pytest.raises(UsageError, match=", ".join(NETWORKS)):
        build_network("transformer", SHAPE, 10)


def test_the_model_normalises_bytes_with_the_specs_mean_and_deviation() -> None:
    spec = PreprocessSpec(
        mode="RGB", width_px=4, height_px=4, mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2)
    )
    preprocessed = build_preprocessed(ListedNetwork("dense"), spec, 2)
    preprocessed.network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Identity())
    pixels = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    expected = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    logits, features = preprocessed(pixels)
    torch.testing.assert_close(logits, expected.flatten(1))
    torch.testing.assert_close(features, logits)


@pytest.mark.parametrize(("name", "width"), [("dense", 128), ("cnn", 128), ("resnet", 128)])
def test_features_are_the_input_of_the_last_layer(name: str, width: int) -> None:
    spec = PreprocessSpec(mode="L", width_px=28, height_px=28, mean=(0.5,), std=(0.5,))
    preprocessed = build_preprocessed(ListedNetwork(name), spec, 3).eval()
    logits, features = preprocessed(torch.zeros((2, 28, 28, 1), dtype=torch.uint8))
    assert features.shape == (2, width)
    torch.testing.assert_close(preprocessed.network.logits(features), logits)


def test_convolutions_get_the_channels_last_layout_without_a_copy() -> None:
    spec = PreprocessSpec(mode="RGB", width_px=8, height_px=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    preprocessed = build_preprocessed(ListedNetwork("cnn", {"filters": [4]}), spec, 2)
    seen = []
    preprocessed.network.conv1.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0])
    )
    preprocessed(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
