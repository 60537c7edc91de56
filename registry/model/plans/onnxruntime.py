"""ONNX Runtime on the CPU, fp32."""

from typing import ClassVar

from registry.model.bundle import ONNX_GRAPH
from registry.model.image.decode import Pixels
from registry.model.manifest import Precision
from registry.model.plans.base import Outputs, Plan, PlanContext, PredictFn


class OnnxRuntime(Plan):
    """fp32 from the bundle's ONNX graph."""

    name = "onnxruntime-fp32"
    precision: ClassVar[Precision] = "fp32"
    packages = ("onnxruntime",)
    exports = (ONNX_GRAPH,)

    def load(self, context: PlanContext) -> PredictFn:
        """The forward pass of the bundle's ONNX graph.

        Without ``context.threads``, ONNX Runtime chooses the number of threads.

        Raises:
            BundleInvalid: the graph is missing or damaged, or may refer to another file.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = context.threads or 0
        options.inter_op_num_threads = 1
        # Otherwise a file with "ORTM" in the right place is read as ONNX Runtime's own format.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        session = onnxruntime.InferenceSession(
            context.bundle.graph(ONNX_GRAPH), options, providers=["CPUExecutionProvider"]
        )

        def predict(pixels: Pixels) -> Outputs:
            return Outputs(*session.run(None, {"pixels": pixels}))

        return predict


PLANS = (OnnxRuntime(),)
