"""Reads weights for networks of torch without running code, and exports the networks as graphs."""

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from registry.core.errors import UsageError
from training.publishing.export import export_onnx

# Members of a training checkpoint that hold the weights.
WEIGHTS_MEMBERS = ("state_dict", "model_state_dict", "model", "weights")
DISTRIBUTED_PREFIX = "module."  # of the names in DistributedDataParallel
# The exported graph's scores may differ from the network's by this part of the largest score.
EXPORT_TOLERANCE = 1e-3
CHECKED = 3  # pictures; another batch size than the example's


def read_weights(file: Path) -> dict[str, Tensor]:
    """The weights in a file of safetensors, or in a checkpoint of torch, by name.

    Nothing in the file is run: torch reads it with ``weights_only``.

    Raises:
        UsageError: the file cannot be read, or holds something else than weights.
    """
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        found = torch.load(  # noqa: TID251 - with weights_only, and never when serving
            file, map_location="cpu", weights_only=True
        )
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    except Exception as error:  # torch raises a dozen kinds on damaged files
        raise UsageError(
            f"{file} holds more than weights, or is damaged; save network.state_dict(), or use "
            f"safetensors: {str(error).partition(chr(10))[0][:200]}"
        ) from error
    for member in WEIGHTS_MEMBERS:
        if isinstance(found, dict) and isinstance(found.get(member), dict):
            found = found[member]
            break
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise UsageError(f"{file} holds no weights: save network.state_dict(), or use safetensors")
    return {str(name).removeprefix(DISTRIBUTED_PREFIX): each for name, each in found.items()}


def set_weights(network: nn.Module, file: Path) -> None:
    """Read the weights in ``file`` into ``network``.

    Raises:
        UsageError: as ``read_weights``; or names or shapes do not fit the network.
    """
    try:
        network.load_state_dict(read_weights(file), strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise UsageError(f"{file} does not fit the network: {' '.join(lines)[:400]}") from error


def to_graph(network: nn.Module, shape: tuple[int, int, int]) -> bytes:
    """The ONNX graph of ``network``, from normalised pictures (N, C, H, W) to scores.

    Args:
        network: takes float32 (N, C, H, W) and returns a tensor (N, classes).
        shape: (height, width, channels) of the pictures.

    Raises:
        UsageError: the network cannot be exported, or its graph answers differently.
    """
    height_px, width_px, channels = shape
    network = network.cpu().float().eval()
    pictures = torch.rand(CHECKED, channels, height_px, width_px)
    with torch.inference_mode():
        wanted = _scores(network, pictures)
    sizes = ({0: torch.export.Dim("images", min=1, max=4096)},)
    try:
        graph = export_onnx(network, (pictures[:2],), sizes, ["pictures"], ["scores"])
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"the network cannot be exported as ONNX: {text[:300]}; try torch.onnx.export on it, "
            "and import the file"
        ) from error
    _check_export(graph, pictures, wanted)
    return graph


def _scores(network: nn.Module, pictures: Tensor) -> Any:
    try:
        found = network(pictures)
    except Exception as error:
        raise UsageError(
            f"the network does not take float32 {tuple(pictures.shape)}: "
            f"{str(error).strip().partition(chr(10))[0][:300]}; --preprocess says size and mode"
        ) from error
    if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(pictures):
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(f"the network returns {what}; it must return a tensor (images, classes)")
    return found.numpy()


def _check_export(graph: bytes, pictures: Tensor, wanted: Any) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pictures": pictures.numpy()})
    allowed = EXPORT_TOLERANCE * max(1.0, float(np.abs(wanted).max()))
    if not (difference := float(np.abs(found - wanted).max())) <= allowed:
        raise UsageError(
            f"the exported graph answers differently: a score differs by {difference:.3g}; "
            f"{allowed:.3g} is allowed"
        )
