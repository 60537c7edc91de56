"""OpenVINO on the CPU: fp32, bf16, and int8 quantised after training by NNCF.

One model takes any batch size: fixed sizes of 1, 8 and 32 were at most a fifth faster
(docs/decisions/0006), and each costs its own memory.
"""

import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from registry.contract import Precision
from registry.devices import BF16_FLAGS, INT8_FLAGS
from registry.plans.plan import Plan, ReadArtefact, Run, Source
from registry.preprocess import Pixels

MODEL, WEIGHTS = "model.xml", "model.bin"


class OpenVino(Plan):
    """fp32; the subclasses change the precision."""

    name = "openvino-fp32"
    precision: ClassVar[Precision] = "fp32"
    packages: ClassVar[tuple[str, ...]] = ("torch", "openvino")

    def build(self, source: Source, folder: Path) -> None:
        openvino = _import_openvino()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its torch front end uses what torch 2.13 deprecates
            model = openvino.convert_model(source.scored_program, example_input=source.example())
        model.reshape({0: [-1, *source.bundle.manifest.preprocess.shape]})
        openvino.save_model(self.prepare(model, source), folder / MODEL, compress_to_fp16=False)

    def prepare(self, model: Any, source: Source) -> Any:
        """The model to write, from the one that was converted."""
        return model

    def load(self, source: Source, read: ReadArtefact) -> Run:
        openvino = _import_openvino()
        core = openvino.Core()
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32",
            "NUM_STREAMS": 1,
            # Else each worker of a machine pins its forward passes to the same first core.
            "ENABLE_CPU_PINNING": False,
        }
        if source.threads is not None:
            options["INFERENCE_NUM_THREADS"] = source.threads
        model = core.read_model(read(MODEL), read(WEIGHTS))
        request = core.compile_model(model, "CPU", options).create_infer_request()

        def run(pixels: Pixels) -> NDArray[np.float32]:
            request.infer(pixels, share_inputs=True)
            probabilities: NDArray[np.float32] = request.get_output_tensor(0).data.copy()
            return probabilities

        return run


class OpenVinoBf16(OpenVino):
    name = "openvino-bf16"
    precision: ClassVar[Precision] = "bf16"
    cpu_flags = BF16_FLAGS


class OpenVinoInt8(OpenVino):
    """Ranges come from the bundle's calibration pictures, which training took from its own part."""

    name = "openvino-int8"
    precision: ClassVar[Precision] = "int8"
    packages = (*OpenVino.packages, "nncf")
    cpu_flags = INT8_FLAGS

    def prepare(self, model: Any, source: Source) -> Any:
        import nncf

        pixels = source.bundle.calibration()
        calibration = nncf.Dataset([pixels[index : index + 1] for index in range(len(pixels))])
        with Path(os.devnull).open("w") as quiet, contextlib.redirect_stdout(quiet):
            return nncf.quantize(
                model,
                calibration,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(pixels),
            )


def _import_openvino() -> Any:
    # It and NNCF report to their makers, without having asked, wherever they can import this.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


PLANS = (OpenVino(), OpenVinoBf16(), OpenVinoInt8())
