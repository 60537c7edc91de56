"""OpenVINO on the CPU: fp32, bf16, and int8 that NNCF quantised after training.

One compiled model serves every batch size. Models with fixed sizes of 1, 8 and 32 were at most a
fifth faster (docs/decisions/0006), and each takes memory of its own.
"""

import io
import sys
from typing import Any, ClassVar

from registry.core.devices import BF16_FLAGS, INT8_FLAGS
from registry.core.errors import DeviceUnavailable
from registry.model.bundle import INT8_GRAPH, INT8_WEIGHTS, ONNX_GRAPH, Bundle
from registry.model.image.decode import Pixels
from registry.model.manifest import Precision
from registry.model.plans.base import Outputs, Plan, PlanContext, PredictFn


class OpenVino(Plan):
    """fp32; subclasses change the precision."""

    name = "openvino-fp32"
    precision: ClassVar[Precision] = "fp32"
    packages = ("openvino",)
    exports: ClassVar[tuple[str, ...]] = (ONNX_GRAPH,)

    def load(self, context: PlanContext) -> PredictFn:
        """The forward pass of the bundle's graph, compiled for this CPU.

        The arrays that it returns are copies: the next call does not change them.

        Raises:
            DeviceUnavailable: the plan is bf16, and OpenVINO has no bf16 kernels for this CPU.
            BundleInvalid: the graph is missing or damaged, or may refer to another file.
        """
        openvino = import_openvino()
        core = openvino.Core()
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32",
            "NUM_STREAMS": 1,
            # Otherwise every worker of a machine pins its forward passes to the same first core.
            "ENABLE_CPU_PINNING": False,
        }
        if context.threads is not None:
            options["INFERENCE_NUM_THREADS"] = context.threads
        compiled = core.compile_model(self.read_model(openvino, context.bundle), "CPU", options)
        computed = compiled.get_property("INFERENCE_PRECISION_HINT")
        if self.precision == "bf16" and computed != openvino.Type.bf16:
            raise DeviceUnavailable("OpenVINO has no bf16 kernels for this CPU; use openvino-fp32")
        request = compiled.create_infer_request()

        outputs = range(len(compiled.outputs))

        def predict(pixels: Pixels) -> Outputs:
            request.infer(pixels, share_inputs=True)
            return Outputs(*(request.get_output_tensor(index).data.copy() for index in outputs))

        return predict

    def read_model(self, openvino: Any, bundle: Bundle) -> Any:
        """The ONNX graph of the bundle as an OpenVINO model.

        ``Core.read_model`` would guess the format: it reads a valid ONNX file as OpenVINO's own
        format if there is XML near its beginning, for example in ``producer_name``.
        """
        reader = openvino.frontend.FrontEndManager().load_by_framework("onnx")
        return reader.convert(reader.load(io.BytesIO(bundle.graph(ONNX_GRAPH))))


class OpenVinoBf16(OpenVino):
    """bf16, computed from the fp32 graph."""

    name = "openvino-bf16"
    precision: ClassVar[Precision] = "bf16"
    cpu_flags = BF16_FLAGS


class OpenVinoInt8(OpenVino):
    """int8, from the bundle's quantised graph."""

    name = "openvino-int8"
    precision: ClassVar[Precision] = "int8"
    exports = (INT8_GRAPH, INT8_WEIGHTS)
    cpu_flags = INT8_FLAGS

    def read_model(self, openvino: Any, bundle: Bundle) -> Any:
        """The int8 graph as an OpenVINO model. It is in OpenVINO's own format, XML and weights."""
        return openvino.Core().read_model(bundle.graph(INT8_GRAPH), bundle.read(INT8_WEIGHTS))


def import_openvino() -> Any:
    """The ``openvino`` module, without its telemetry."""
    # OpenVINO and NNCF send usage reports to their makers, without asking, if they can import this.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino
    import openvino.frontend

    return openvino


PLANS = (OpenVino(), OpenVinoBf16(), OpenVinoInt8())
