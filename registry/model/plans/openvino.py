"""OpenVINO on the CPU: fp32, bf16, and int8 quantised after training by NNCF.

One model takes any batch size: fixed sizes of 1, 8 and 32 were at most a fifth faster
(docs/decisions/0006), and each costs its own memory.
"""

import io
import sys
from typing import Any, ClassVar

from registry.core.devices import BF16_FLAGS, INT8_FLAGS
from registry.core.errors import DeviceUnavailable
from registry.model.bundle import INT8_GRAPH, INT8_WEIGHTS, ONNX_GRAPH, Bundle
from registry.model.image.decode import Pixels
from registry.model.manifest import Precision
from registry.model.plans.base import Outputs, Plan, PredictFn, Source


class OpenVino(Plan):
    """fp32; the subclasses change the precision."""

    name = "openvino-fp32"
    precision: ClassVar[Precision] = "fp32"
    packages = ("openvino",)
    exports: ClassVar[tuple[str, ...]] = (ONNX_GRAPH,)

    def load(self, source: Source) -> PredictFn:
        openvino = import_openvino()
        core = openvino.Core()
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32",
            "NUM_STREAMS": 1,
            # Else each worker of a machine pins its forward passes to the same first core.
            "ENABLE_CPU_PINNING": False,
        }
        if source.threads is not None:
            options["INFERENCE_NUM_THREADS"] = source.threads
        compiled = core.compile_model(self.read_model(openvino, source.bundle), "CPU", options)
        computed = compiled.get_property("INFERENCE_PRECISION_HINT")
        if self.precision == "bf16" and computed != openvino.Type.bf16:
            raise DeviceUnavailable("OpenVINO has no bf16 kernels for this CPU")
        request = compiled.create_infer_request()

        outputs = range(len(compiled.outputs))

        def predict(pixels: Pixels) -> Outputs:
            request.infer(pixels, share_inputs=True)
            return Outputs(*(request.get_output_tensor(index).data.copy() for index in outputs))

        return predict

    def read_model(self, openvino: Any, bundle: Bundle) -> Any:
        """The graph as a model, read as ONNX.

        ``Core.read_model`` would guess: it reads a valid ONNX file as OpenVINO's own format if XML
        stands near its beginning, in ``producer_name`` for example.
        """
        reader = openvino.frontend.FrontEndManager().load_by_framework("onnx")
        return reader.convert(reader.load(io.BytesIO(bundle.graph(ONNX_GRAPH))))


class OpenVinoBf16(OpenVino):
    name = "openvino-bf16"
    precision: ClassVar[Precision] = "bf16"
    cpu_flags = BF16_FLAGS


class OpenVinoInt8(OpenVino):
    name = "openvino-int8"
    precision: ClassVar[Precision] = "int8"
    exports = (INT8_GRAPH, INT8_WEIGHTS)
    cpu_flags = INT8_FLAGS

    def read_model(self, openvino: Any, bundle: Bundle) -> Any:
        """As ``OpenVino.read_model``, in OpenVINO's own format: only that begins with XML."""
        return openvino.Core().read_model(bundle.graph(INT8_GRAPH), bundle.read(INT8_WEIGHTS))


def import_openvino() -> Any:
    # It and NNCF report to their makers, without having asked, wherever they can import this.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino
    import openvino.frontend

    return openvino


PLANS = (OpenVino(), OpenVinoBf16(), OpenVinoInt8())
