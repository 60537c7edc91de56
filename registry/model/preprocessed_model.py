"""``PreprocessedModel``: a network with its normalisation, from pixels to logits and features."""

from typing import Any

import torch
from torch import Tensor, nn

from registry.core.errors import BundleInvalid, NetworkImpossible, UsageError
from registry.model.bundle import Bundle
from registry.model.manifest import ListedNetwork, PreprocessSpec
from registry.model.networks import build_network


class PreprocessedModel(nn.Module):
    """A network with its normalisation in front, so that the device receives bytes, not floats.

    The permuted view of row-major pixels already has the channels-last layout, in which
    convolutions run fastest here.
    """

    scale: Tensor
    offset: Tensor
    dtype = torch.float32
    """The dtype of the network's weights. The normalisation stays in fp32 in every plan."""

    def __init__(self, network: nn.Sequential, spec: PreprocessSpec) -> None:
        """The last layer of ``network`` computes logits from features."""
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        # Computes (x / 255 - mean) / std with one multiplication and one addition per channel.
        self.register_buffer("scale", (1 / (255 * std)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("offset", (-mean / std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits float32 (N, classes) and features float32 (N, D) for uint8 pixels (N, H, W, C)."""
        x = pixels.permute(0, 3, 1, 2).float()  # (N, C, H, W)
        features = (x * self.scale + self.offset).to(self.dtype)
        *layers, head = self.network
        for layer in layers:
            features = layer(features)
        return head(features).float(), features.float()


def any_batch(shape: tuple[int, int, int]) -> tuple[tuple[Tensor], tuple[dict[int, Any]]]:
    """Example arguments for exporters: images of ``shape`` (H, W, C), in batches of 1 to 4096.

    Returns:
        Arguments of ``PreprocessedModel`` and their dynamic shapes. The pixels are uint8
        (2, H, W, C), because exporters take a batch of 1 for a fixed size.
    """
    pixels = torch.zeros((2, *shape), dtype=torch.uint8)
    return (pixels,), ({0: torch.export.Dim("images", min=1, max=4096)},)


def build_preprocessed(
    spec: ListedNetwork, preprocess: PreprocessSpec, classes: int
) -> PreprocessedModel:
    """A model of the network ``spec`` with random weights; raises as ``build_network``."""
    height_px, width_px, channels = preprocess.shape
    network = build_network(spec.name, (channels, height_px, width_px), classes, **spec.args)
    return PreprocessedModel(network, preprocess)


def load_preprocessed(bundle: Bundle) -> PreprocessedModel:
    """The model of ``bundle`` with its weights, in evaluation mode.

    Raises:
        BundleInvalid: the weights do not fit the network, or the network is an ONNX graph.
    """
    manifest = bundle.manifest
    spec = manifest.network
    if not isinstance(spec, ListedNetwork):
        raise BundleInvalid(f"{manifest.model}: its network is a graph; torch cannot load it")
    height_px, width_px, channels = manifest.preprocess.shape
    try:
        with torch.device("meta"):  # no memory, however large a network the manifest asks for
            shape = channels, height_px, width_px
            network = build_network(spec.name, shape, len(manifest.labels), **spec.args)
        tensors = {name: torch.from_numpy(array) for name, array in bundle.weights().items()}
        for name, wanted in network.state_dict().items():
            if name in tensors and tensors[name].dtype != wanted.dtype:
                raise NetworkImpossible(f"{name} is {tensors[name].dtype}, not {wanted.dtype}")
        network.load_state_dict(tensors, strict=True, assign=True)
    except (UsageError, NetworkImpossible, RuntimeError) as error:
        raise BundleInvalid(
            f"the weights of {manifest.model} do not fit its network: {error}"
        ) from error
    return PreprocessedModel(network, manifest.preprocess).eval()
