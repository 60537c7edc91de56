"""torch, operation by operation: the plan that always exists, and two that prepare the weights.

Folding multiplies each batch norm into the convolution before it. In evaluation a batch norm is
only a scale and an offset per channel, so its layer disappears.
"""

import copy
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from registry.core.devices import BF16_FLAGS, describe_device, device_errors
from registry.model.classifier import Classifier
from registry.model.image.decode import Pixels
from registry.model.manifest import Precision
from registry.model.plans.base import Outputs, Plan, PlanContext, PredictFn

if TYPE_CHECKING:
    import torch

    from registry.model.preprocessed_model import PreprocessedModel

EAGER = "torch-eager"


def torch_predict(preprocessed: "PreprocessedModel", device: str) -> PredictFn:
    """A forward pass of ``preprocessed`` on ``device``, in the model's own precision."""
    import torch

    ready = preprocessed.to(device).eval()

    @torch.inference_mode()
    def predict(pixels: Pixels) -> Outputs:
        logits, features = ready(torch.from_numpy(pixels).to(device))
        return Outputs(logits.cpu().numpy(), features.cpu().numpy())

    return predict if device == "cpu" else device_errors()(predict)


def eager_classifier(preprocessed: "PreprocessedModel", device: str) -> Classifier:
    """The classifier of a model without a bundle; training measures it."""
    return Classifier(torch_predict(preprocessed, device), EAGER, describe_device(device))


def fold(preprocessed: "PreprocessedModel", precision: Precision) -> "PreprocessedModel":
    """A copy with batch norm folded into convolutions, and with the weights in ``precision``.

    ``precision`` is fp32, bf16 or fp16; int8 is not supported here.
    """
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    folded = copy.deepcopy(preprocessed).eval()
    _fold_norms(folded.network)
    folded.network.to(dtype=dtype, memory_format=torch.channels_last)
    folded.dtype = dtype
    return folded


def _fold_norms(module: "torch.nn.Module") -> None:
    """Fold each batch norm into the convolution that comes just before it in the same module.

    In every network of ``NETWORKS``, the modules run in their order. If one did not, the replay of
    the golden images would fail.
    """
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    children = list(module.named_children())
    for (before_name, before), (name, child) in pairwise([("", module), *children]):
        if isinstance(child, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
            setattr(module, before_name, fuse_conv_bn_eval(before, child))
            setattr(module, name, nn.Identity())
        _fold_norms(child)


class TorchEager(Plan):
    """fp32, channels last, unprepared weights, as training evaluates the network."""

    name = EAGER
    precision: ClassVar[Precision] = "fp32"
    device = "any"

    def load(self, context: PlanContext) -> PredictFn:
        """The forward pass in torch, on ``context.device``.

        ``context.threads``, if given, is set for all of torch in this process. On a GPU, the
        forward pass raises ``DeviceOutOfMemory`` and ``DeviceLost``.

        Raises:
            BundleInvalid: the weights do not fit the network, or the network is an ONNX graph.
        """
        import torch

        if context.threads is not None:
            torch.set_num_threads(context.threads)
        return torch_predict(self.prepare(context.preprocessed), context.device)

    def prepare(self, preprocessed: "PreprocessedModel") -> "PreprocessedModel":
        """The model that runs; subclasses change its weights here."""
        return preprocessed


class TorchFp32(TorchEager):
    """fp32 with batch norm folded."""

    name = "torch-fp32"
    device = "cpu"

    def prepare(self, preprocessed: "PreprocessedModel") -> "PreprocessedModel":
        """A copy with batch norm folded, its weights in the plan's precision."""
        return fold(preprocessed, self.precision)


class TorchBf16(TorchFp32):
    """bf16 with batch norm folded, if the CPU multiplies bf16 natively."""

    name = "torch-bf16"
    precision: ClassVar[Precision] = "bf16"
    cpu_flags = BF16_FLAGS


PLANS = (TorchEager(), TorchFp32(), TorchBf16())
