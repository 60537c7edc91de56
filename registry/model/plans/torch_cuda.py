"""torch on a GPU in half precision: channels last, batch norm folded, one CUDA graph a batch size.

A graph replays all kernels of a forward pass in one launch; at small batches the launches of a
small network cost more than its arithmetic. A graph has a fixed shape, so a batch is filled up to
the next size that has one.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from registry.core.devices import device_errors
from registry.model.image.decode import Pixels
from registry.model.manifest import Precision
from registry.model.plans.base import Plan, Run, Source
from registry.model.plans.torch_eager import fold

if TYPE_CHECKING:
    import torch

BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class CudaFp16(Plan):
    name = "cuda-fp16"
    precision: ClassVar[Precision] = "fp16"
    device = "cuda"
    batch_sizes = BUCKETS

    def load(self, source: Source) -> Run:
        import torch

        from registry.model.networks import scored

        device = torch.device(source.device)
        with device_errors():
            program = fold(source.program, self.precision).to(device)
            ready = scored(program)
            shape = source.bundle.manifest.preprocess.shape
            pool = torch.cuda.graph_pool_handle()
            graphs = {size: _capture(ready, (size, *shape), device, pool) for size in BUCKETS}

        @device_errors()
        @torch.inference_mode()
        def run(pixels: Pixels) -> NDArray[np.float32]:
            parts = []
            for start in range(0, len(pixels), BUCKETS[-1]):
                part = torch.from_numpy(pixels[start : start + BUCKETS[-1]])
                graph, given, answer = graphs[_bucket(len(part))]
                given[: len(part)].copy_(part)  # what an earlier batch left behind it stays
                graph.replay()
                parts.append(answer[: len(part)].cpu())
            probabilities: NDArray[np.float32] = torch.cat(parts).numpy()
            return probabilities

        return run


class CudaBf16(CudaFp16):
    name = "cuda-bf16"
    precision: ClassVar[Precision] = "bf16"


def _bucket(images: int) -> int:
    return next(size for size in BUCKETS if size >= images)


def _capture(
    scored: "torch.nn.Module",
    shape: tuple[int, int, int, int],
    device: "torch.device",
    pool: Any,
) -> tuple["torch.cuda.CUDAGraph", "torch.Tensor", "torch.Tensor"]:
    """A graph of one forward pass, the tensor that it reads and the one that it writes."""
    import torch

    given = torch.zeros(shape, dtype=torch.uint8, device=device)
    with torch.inference_mode():
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # libraries choose their kernels outside the capture
            for _ in range(3):
                scored(given)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are part of it: others answer by an older version meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            answer = scored(given).float()
    return graph, given, answer


PLANS = (CudaFp16(), CudaBf16())
