"""ONNX Runtime on the CPU, fp32."""

import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from registry.contract import Precision
from registry.plans.plan import Plan, ReadArtefact, Run, Source
from registry.preprocess import Pixels

GRAPH = "graph.onnx"


class OnnxRuntime(Plan):
    name = "onnxruntime-fp32"
    precision: ClassVar[Precision] = "fp32"
    packages = ("torch", "onnxruntime", "onnx", "onnxscript")

    def build(self, source: Source, folder: Path) -> None:
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.13's exporter warns of its own code
            exported = torch.onnx.export(
                source.scored_program,
                (source.example(),),
                input_names=["pixels"],
                dynamic_shapes=({0: torch.export.Dim("images", min=1, max=4096)},),
                dynamo=True,
                verbose=False,
            )
        assert exported is not None
        (folder / GRAPH).write_bytes(exported.model_proto.SerializeToString())

    def load(self, source: Source, read: ReadArtefact) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = source.threads or 0
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            read(GRAPH), options, providers=["CPUExecutionProvider"]
        )

        def run(pixels: Pixels) -> NDArray[np.float32]:
            (probabilities,) = session.run(None, {"pixels": pixels})
            return np.asarray(probabilities)

        return run


PLANS = (OnnxRuntime(),)
