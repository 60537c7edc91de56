"""Exports the network as graphs that engines run without torch, once, when it is published.

Workers then serve byte for byte the graphs that publishing measured, and need neither torch nor
exporters. Every graph takes ``pixels`` and returns ``logits`` and ``features``, as described in
``registry.model.plans``.
"""

import contextlib
import copy
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from registry.model.bundle import INT8_GRAPH, INT8_WEIGHTS, ONNX_GRAPH
from registry.model.image.decode import Pixels
from registry.model.plans.openvino import import_openvino
from registry.model.preprocessed_model import PreprocessedModel, any_batch

log = logging.getLogger(__name__)
# The exporters tell of each step, and of libraries that these networks do not need.
for _name in ("onnxscript", "onnx_ir"):
    logging.getLogger(_name).setLevel(logging.WARNING)
logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def export_network(preprocessed: PreprocessedModel, calibration: Pixels) -> dict[str, bytes]:
    """Files of a bundle by name: the graph in fp32 for ONNX, and in int8 for OpenVINO.

    A graph that cannot be exported is left out, with a warning. Workers then use other plans.

    Args:
        preprocessed: the trained model, on any device; it is copied.
        calibration: uint8 (N, H, W, C), training pictures, from which int8 takes its ranges.
    """
    ready = copy.deepcopy(preprocessed).cpu().eval()
    try:
        files = {ONNX_GRAPH: _to_onnx(ready, calibration)}
    except Exception as error:  # noqa: BLE001 - exporters raise errors of many types
        log.warning("the network cannot be exported: %s", str(error).partition("\n")[0])
        return {}
    try:
        files |= to_int8(_convert(ready, calibration), calibration)
    except Exception as error:  # noqa: BLE001 - as above, or OpenVINO is not installed
        log.warning("the int8 graph cannot be exported: %s", str(error).partition("\n")[0])
    return files


def _to_onnx(ready: nn.Module, calibration: Pixels) -> bytes:
    arguments, sizes = any_batch(calibration.shape[1:])
    return export_onnx(ready, arguments, sizes, ["pixels"], ["logits", "features"])


def export_onnx(
    network: nn.Module,
    arguments: tuple[torch.Tensor],
    dynamic_shapes: tuple[dict[int, Any]],
    inputs: list[str],
    outputs: list[str],
) -> bytes:
    """``network`` as an ONNX model that carries its weights.

    Args:
        network: in evaluation mode, on the CPU.
        arguments: an example of its input.
        dynamic_shapes: the axes of the input that may have any size.
        inputs: the name of the input in the graph.
        outputs: the names of the outputs.

    Raises:
        Exception: of any type, if the exporter does not know how.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13's exporter warns about its own code
        exported = torch.onnx.export(
            network,
            arguments,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
            dynamo=True,
            verbose=False,
        )
    assert exported is not None
    graph = exported.model_proto
    for part in (graph, graph.graph, *graph.graph.node, *graph.graph.value_info):
        part.ClearField("metadata_props")  # stack traces that contain paths of this machine
    data: bytes = graph.SerializeToString()
    return data


def _convert(ready: nn.Module, calibration: Pixels) -> Any:
    """The network as an OpenVINO model, by OpenVINO's own conversion.

    From the ONNX graph, NNCF made an int8 graph with an accuracy of 0.38 instead of 0.95
    (docs/decisions/0006).
    """
    (pixels,), _ = any_batch(calibration.shape[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # OpenVINO calls functions that torch 2.13 deprecates
        return import_openvino().convert_model(ready, example_input=pixels)


def to_int8(model: Any, calibration: Pixels) -> dict[str, bytes]:
    """The files of an OpenVINO model in int8, quantised after training.

    Weights use half of the 8-bit range (``overflow_fix``): a CPU without VNNI adds pairs of
    products in 16 bits, and these sums then cannot saturate. So every kind of CPU computes the same
    sums, and the accuracy recorded at publishing holds on each of them.
    """
    openvino = import_openvino()
    import nncf

    model.reshape({0: [-1, *calibration.shape[1:]]})
    examples = nncf.Dataset([calibration[index : index + 1] for index in range(len(calibration))])
    with Path(os.devnull).open("w") as quiet, contextlib.redirect_stdout(quiet):
        quantised = nncf.quantize(
            model,
            examples,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE
            ),
        )
    with tempfile.TemporaryDirectory(prefix="convoy-export-") as folder:
        written = Path(folder, "int8.xml")
        openvino.save_model(quantised, written, compress_to_fp16=False)
        return {
            INT8_GRAPH: written.read_bytes(),
            INT8_WEIGHTS: written.with_suffix(".bin").read_bytes(),
        }
