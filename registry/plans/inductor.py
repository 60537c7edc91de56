"""torch's own compiler, ahead of time: C++ for this CPU, built once and loaded in a moment."""

import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from registry.contract import Precision
from registry.devices import BF16_FLAGS
from registry.plans.plan import Plan, ReadArtefact, Run, Source
from registry.plans.torch_eager import fold
from registry.preprocess import Pixels

PACKAGE = "package.pt2"


class InductorFp32(Plan):
    """AOTInductor, fp32, batch norm folded."""

    name = "inductor-fp32"
    precision: ClassVar[Precision] = "fp32"
    builds_slowly = True  # 8 to 30 s

    def unsupported(self, device: str) -> str | None:
        if reason := super().unsupported(device):
            return reason
        found = shutil.which(os.environ.get("CXX", "g++"))
        return None if found else "there is no C++ compiler"

    def build(self, source: Source, folder: Path) -> None:
        import torch
        from torch import _inductor

        from registry.networks import any_batch, scored

        arguments, sizes = any_batch(source.bundle.manifest.preprocess.shape)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.13's exporter warns of its own code
            exported = torch.export.export(
                scored(fold(source.program, self.precision)), arguments, dynamic_shapes=sizes
            )
            # Not with inductor's "freezing": in torch 2.13 its answers were off by 0.97.
            _inductor.aoti_compile_and_package(exported, package_path=str(folder / PACKAGE))

    def load(self, source: Source, read: ReadArtefact) -> Run:
        import torch
        from torch import _inductor

        if source.threads is not None:
            torch.set_num_threads(source.threads)
        # It reads a file only: one of our own, with the bytes whose digest was checked.
        with tempfile.NamedTemporaryFile(suffix=".pt2") as file:
            file.write(read(PACKAGE))
            file.flush()
            compiled = _inductor.aoti_load_package(file.name)

        def run(pixels: Pixels) -> NDArray[np.float32]:
            with torch.inference_mode():
                probabilities: NDArray[np.float32] = compiled(torch.from_numpy(pixels)).numpy()
            return probabilities

        return run


class InductorBf16(InductorFp32):
    name = "inductor-bf16"
    precision: ClassVar[Precision] = "bf16"
    cpu_flags = BF16_FLAGS


PLANS = (InductorFp32(), InductorBf16())
