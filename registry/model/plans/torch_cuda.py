"""torch on a GPU in half precision: channels last, batch norm folded, a CUDA graph per batch size.

A graph replays all kernels of a forward pass in one launch. In small batches, a small network's
launches cost more than its arithmetic. A graph has a fixed shape, so a batch is padded to the next
size that has a graph.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from registry.core.devices import device_errors
from registry.model.image.decode import Pixels
from registry.model.manifest import Precision
from registry.model.plans.base import Outputs, Plan, PlanContext, PredictFn
from registry.model.plans.torch_eager import fold

if TYPE_CHECKING:
    import torch

    from registry.model.preprocessed_model import PreprocessedModel

BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class CudaFp16(Plan):
    """fp16 on a GPU."""

    name = "cuda-fp16"
    precision: ClassVar[Precision] = "fp16"
    device = "cuda"
    batch_sizes = BUCKETS

    def load(self, context: PlanContext) -> PredictFn:
        """The forward pass with a CUDA graph for each size of ``BUCKETS``, captured now.

        The forward pass splits a larger batch than the largest of them. It raises the same GPU
        errors as this method.

        Raises:
            DeviceOutOfMemory: the GPU has too little free memory.
            DeviceLost: any other GPU error; after it, every GPU call of this process fails.
        """
        import torch

        device = torch.device(context.device)
        with device_errors():
            preprocessed = fold(context.preprocessed, self.precision).to(device)
            shape = context.bundle.manifest.preprocess.shape
            pool = torch.cuda.graph_pool_handle()
            graphs = {
                size: _capture(preprocessed, (size, *shape), device, pool) for size in BUCKETS
            }

        @device_errors()
        @torch.inference_mode()
        def predict(pixels: Pixels) -> Outputs:
            parts = []
            for start in range(0, len(pixels), BUCKETS[-1]):
                part = torch.from_numpy(pixels[start : start + BUCKETS[-1]])
                graph, given, outputs = graphs[_bucket(len(part))]
                # The padding after it keeps pixels of an earlier batch; their outputs are dropped.
                given[: len(part)].copy_(part)
                graph.replay()
                parts.append(Outputs(*(each[: len(part)].cpu().numpy() for each in outputs)))
            return Outputs.joined(parts)

        return predict


class CudaBf16(CudaFp16):
    """bf16 on a GPU."""

    name = "cuda-bf16"
    precision: ClassVar[Precision] = "bf16"


def _bucket(images: int) -> int:
    return next(size for size in BUCKETS if size >= images)


def _capture(
    preprocessed: "PreprocessedModel",
    shape: tuple[int, int, int, int],
    device: "torch.device",
    pool: Any,
) -> tuple["torch.cuda.CUDAGraph", "torch.Tensor", tuple["torch.Tensor", ...]]:
    """A graph of one forward pass, its input tensor and its output tensors."""
    import torch

    given = torch.zeros(shape, dtype=torch.uint8, device=device)
    with torch.inference_mode():
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # libraries choose their kernels outside the capture
            for _ in range(3):
                preprocessed(given)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Capture this thread's calls only: other threads may be serving an older version meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = preprocessed(given)
    return graph, given, outputs


PLANS = (CudaFp16(), CudaBf16())
