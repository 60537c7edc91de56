"""torch, operation by operation: the plan that is always there, and two that prepare the weights.

Folding multiplies each batch norm into the convolution before it: in evaluation it is only a scale
and an offset per channel, so the layer disappears.
"""

import copy
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from registry.core.devices import BF16_FLAGS, describe_device, device_errors
from registry.model.classifier import Classifier
from registry.model.image.decode import Pixels
from registry.model.manifest import Precision
from registry.model.plans.base import Outputs, Plan, PredictFn, Source

if TYPE_CHECKING:
    import torch

    from registry.model.preprocessed_model import PreprocessedModel

EAGER = "torch-eager"


def torch_predict(preprocessed: "PreprocessedModel", device: str) -> PredictFn:
    """Run ``preprocessed``, in whatever precision it is, operation by operation on ``device``."""
    import torch

    ready = preprocessed.to(device).eval()

    @torch.inference_mode()
    def predict(pixels: Pixels) -> Outputs:
        logits, features = ready(torch.from_numpy(pixels).to(device))
        return Outputs(logits.cpu().numpy(), features.cpu().numpy())

    return predict if device == "cpu" else device_errors()(predict)


def eager_classifier(preprocessed: "PreprocessedModel", device: str) -> Classifier:
    """The classifier of a program that lies in no bundle: what training measures."""
    return Classifier(torch_predict(preprocessed, device), EAGER, describe_device(device))


def fold(preprocessed: "PreprocessedModel", precision: Precision) -> "PreprocessedModel":
    """A copy with batch norm folded into convolutions and the network's weights in ``precision``.

    That is fp32, bf16 or fp16; torch's int8 is not among them.
    """
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    folded = copy.deepcopy(preprocessed).eval()
    _fold_norms(folded.network)
    folded.network.to(dtype=dtype, memory_format=torch.channels_last)
    folded.dtype = dtype
    return folded


def _fold_norms(module: "torch.nn.Module") -> None:
    """Fold each batch norm into the convolution that is its elder sibling.

    In every network of ours siblings run in their order; replaying the golden images would find
    out about one where they do not.
    """
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    children = list(module.named_children())
    for (elder_name, elder), (name, child) in pairwise([("", module), *children]):
        if isinstance(child, nn.BatchNorm2d) and isinstance(elder, nn.Conv2d):
            setattr(module, elder_name, fuse_conv_bn_eval(elder, child))
            setattr(module, name, nn.Identity())
        _fold_norms(child)


class TorchEager(Plan):
    """As training evaluates it: fp32, channels last, nothing prepared."""

    name = EAGER
    precision: ClassVar[Precision] = "fp32"
    device = "any"

    def load(self, source: Source) -> PredictFn:
        import torch

        if source.threads is not None:
            torch.set_num_threads(source.threads)
        return torch_predict(self.prepare(source.preprocessed), source.device)

    def prepare(self, preprocessed: "PreprocessedModel") -> "PreprocessedModel":
        return preprocessed


class TorchFp32(TorchEager):
    """fp32 with batch norm folded."""

    name = "torch-fp32"
    device = "cpu"

    def prepare(self, preprocessed: "PreprocessedModel") -> "PreprocessedModel":
        return fold(preprocessed, self.precision)


class TorchBf16(TorchFp32):
    """bf16 with batch norm folded, where the CPU multiplies bf16 natively."""

    name = "torch-bf16"
    precision: ClassVar[Precision] = "bf16"
    cpu_flags = BF16_FLAGS


PLANS = (TorchEager(), TorchFp32(), TorchBf16())
