"""Turns a foreign ONNX graph into the one that bundles hold: from uint8 pixels to logits.

The foreign graph stays as it is inside. The nodes in front of it normalise the pixels and put them
in the layout of its input. The nodes behind it turn its output into logits.
"""

import math
from typing import Any, Literal

import numpy as np
import onnx
from msgspec import Struct
from onnx import TensorProto, compose, helper, numpy_helper

from registry.core.errors import BundleInvalid, UsageError
from registry.model.graphs.onnx_rules import check_onnx
from registry.model.manifest import PreprocessSpec

PREFIX = "imported/"
PIXELS, LOGITS = "pixels", "logits"
MIN_OPSET = 13  # the nodes that this module adds are of this opset's form
# More than any result in a known classifier: 64 channels of a picture of 1,400 by 1,400 pixels.
MAX_RESULT_VALUES = 1 << 27
FLOATS: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}
# Below this, a probability counts as this when its logarithm is taken: exp(-87) in float32.
LEAST_PROBABILITY = 1e-38

Scores = Literal["logits", "probabilities"]
Layout = Literal["NCHW", "NHWC"]


class GraphFacts(Struct, frozen=True, kw_only=True):
    """What a foreign graph takes and gives.

    Attributes:
        input: the name of its image input.
        dtype: ``float32``, ``float16`` or ``uint8``.
        layout: the order of the input's axes.
        height_px: its height, or None if the graph takes any.
        width_px: its width, or None.
        channels: 1 or 3.
        batch: the number of images that the graph takes, or None for any.
        output: the name of the output with a score for each class.
        outputs: how many scores an image gets.
        scores: what they are.
    """

    input: str
    dtype: str
    layout: Layout
    height_px: int | None
    width_px: int | None
    channels: int
    batch: int | None
    output: str
    outputs: int
    scores: Scores


def read_graph(data: bytes) -> onnx.ModelProto:
    """The model in ``data``, after all rules of bundles were checked.

    Raises:
        BundleInvalid: it breaks a rule (``registry.model.graphs.onnx_rules``).
    """
    check_onnx(data)
    try:
        model = onnx.load_model_from_string(data)
        onnx.checker.check_model(model)
        model = onnx.shape_inference.infer_shapes(model)
        version = max(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
        if version < MIN_OPSET:
            model = onnx.version_converter.convert_version(model, MIN_OPSET)
    except Exception as error:  # the package raises errors of many types for malformed models
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise BundleInvalid(f"the graph is not valid: {text[0][:300]}") from error
    _check_results(model)
    return model


def _check_results(model: onnx.ModelProto) -> None:
    """Refuse a graph in which one picture makes an array of absurd size, as far as shapes tell."""
    for value in (*model.graph.value_info, *model.graph.output):
        sizes = [each or 1 for each in _shape(value)]
        if (count := math.prod(sizes)) > MAX_RESULT_VALUES:
            raise BundleInvalid(
                f"the graph makes {value.name[:80]!r} of {count:,} values from one picture; at "
                f"most {MAX_RESULT_VALUES:,} are accepted"
            )


def describe(model: onnx.ModelProto, output: str | None = None) -> GraphFacts:
    """What the graph takes and gives.

    Args:
        model: from ``read_graph``.
        output: the output with the scores, if the graph has several.

    Raises:
        UsageError: it takes no image, or the output must be chosen; the text says how.
    """
    weights = {each.name for each in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(each.name for each in inputs) or "none"
        raise UsageError(f"the graph has {len(inputs)} inputs ({names}); Convoy gives it one image")
    (image,) = inputs
    dtype = _image_dtype(image)
    shape = _shape(image)
    if len(shape) != 4:
        raise UsageError(f"the graph's input {image.name!r} has the shape {shape}, not four axes")
    layout = _layout(shape, image.name)
    channels = shape[1] if layout == "NCHW" else shape[3]
    height_px, width_px = shape[2:] if layout == "NCHW" else shape[1:3]
    chosen = _chosen_output(model, output)
    return GraphFacts(
        input=image.name,
        dtype=dtype,
        layout=layout,
        height_px=height_px,
        width_px=width_px,
        channels=int(channels or 0),
        batch=shape[0],
        output=chosen.name,
        outputs=_output_count(chosen),
        scores="probabilities"
        if _ends_with(model, chosen.name, "Softmax", "Sigmoid")
        else "logits",
    )


def adapt(model: onnx.ModelProto, facts: GraphFacts, spec: PreprocessSpec, scores: Scores) -> bytes:
    """The graph of a bundle: uint8 ``pixels`` (N, H, W, C) to float32 ``logits`` (N, classes).

    A single score becomes two: that of the second class, and 0 for the first.
    """
    inner = compose.add_prefix(model, PREFIX)
    del inner.graph.value_info[:]  # they have the old batch size
    if facts.batch == 1:
        weights_of_inner = {each.name for each in inner.graph.initializer}
        for reshape in (node for node in inner.graph.node if node.op_type == "Reshape"):
            if reshape.input[0] not in weights_of_inner:
                _keep_batch(inner.graph, reshape)
    nodes, weights = _before(facts, spec)
    after_nodes, after_weights = _after(facts, scores)
    opset = max(each.version for each in inner.opset_import if each.domain in ("", "ai.onnx"))
    graph = helper.make_graph(
        [*nodes, *inner.graph.node, *after_nodes],
        "convoy",
        [helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, ["images", *spec.shape])],
        [
            helper.make_tensor_value_info(
                LOGITS, TensorProto.FLOAT, ["images", max(2, facts.outputs)]
            )
        ],
        [*weights, *inner.graph.initializer, *after_weights],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = inner.ir_version
    data: bytes = made.SerializeToString()
    check_onnx(data)
    return data


def _before(facts: GraphFacts, spec: PreprocessSpec) -> tuple[list[Any], list[Any]]:
    """The nodes from pixels to the foreign input: normalisation, layout, dtype."""
    target = PREFIX + facts.input
    if facts.dtype == "uint8":
        if facts.layout == "NHWC":
            return [helper.make_node("Identity", [PIXELS], [target])], []
        return [helper.make_node("Transpose", [PIXELS], [target], perm=[0, 3, 1, 2])], []
    mean, std = np.array(spec.mean), np.array(spec.std)
    weights = [
        numpy_helper.from_array((1 / (255 * std)).astype(np.float32), "convoy/scale"),
        numpy_helper.from_array((-mean / std).astype(np.float32), "convoy/offset"),
    ]
    nodes = [
        helper.make_node("Cast", [PIXELS], ["convoy/float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["convoy/float", "convoy/scale"], ["convoy/scaled"]),
        helper.make_node("Add", ["convoy/scaled", "convoy/offset"], ["convoy/normal"]),
    ]
    last = "convoy/normal"
    if facts.layout == "NCHW":
        nodes.append(helper.make_node("Transpose", [last], ["convoy/nchw"], perm=[0, 3, 1, 2]))
        last = "convoy/nchw"
    kind = TensorProto.FLOAT16 if facts.dtype == "float16" else TensorProto.FLOAT
    nodes.append(helper.make_node("Cast", [last], [target], to=kind))
    return nodes, weights


def _after(facts: GraphFacts, scores: Scores) -> tuple[list[Any], list[Any]]:
    """The nodes from the foreign output to logits whose softmax has the foreign probabilities."""
    weights = [numpy_helper.from_array(np.array([0, facts.outputs], np.int64), "convoy/shape")]
    if scores == "probabilities":
        least = np.array(LEAST_PROBABILITY, np.float32)
        weights.append(numpy_helper.from_array(least, "convoy/least"))
        if facts.outputs == 1:
            weights.append(numpy_helper.from_array(np.array(1, np.float32), "convoy/one"))
    nodes = [
        helper.make_node("Cast", [PREFIX + facts.output], ["convoy/output"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["convoy/output", "convoy/shape"], ["convoy/scores"]),
    ]
    last = "convoy/scores"
    if scores == "probabilities":
        nodes += [
            helper.make_node("Max", [last, "convoy/least"], ["convoy/above"]),
            helper.make_node("Log", ["convoy/above"], ["convoy/log"]),
        ]
        last = "convoy/log"
    if facts.outputs > 1:
        return [*nodes, helper.make_node("Identity", [last], [LOGITS])], weights
    if scores == "probabilities":  # of the second class; the first has the rest
        nodes += [
            helper.make_node("Sub", ["convoy/one", "convoy/scores"], ["convoy/rest"]),
            helper.make_node("Max", ["convoy/rest", "convoy/least"], ["convoy/rest_above"]),
            helper.make_node("Log", ["convoy/rest_above"], ["convoy/first"]),
        ]
    else:
        nodes.append(helper.make_node("Sub", ["convoy/scores", "convoy/scores"], ["convoy/first"]))
    return [*nodes, helper.make_node("Concat", ["convoy/first", last], [LOGITS], axis=1)], weights


def _keep_batch(graph: onnx.GraphProto, reshape: onnx.NodeProto) -> None:
    """Have a Reshape to a batch of one keep any batch: 0 copies the size of the input's axis.

    That is right if the first axis of the input is the batch. If it is not, the trial of several
    images at once fails.
    """
    if any(each.name == "allowzero" and each.i for each in reshape.attribute):
        return
    for each in graph.initializer:
        if each.name == reshape.input[1]:
            shape = numpy_helper.to_array(each).copy()
            if shape.size > 1 and shape[0] == 1:
                shape[0] = 0
                name = f"convoy/shape of {reshape.output[0]}"  # other nodes may read the old one
                graph.initializer.append(numpy_helper.from_array(shape, name))
                reshape.input[1] = name
            return


def _image_dtype(image: onnx.ValueInfoProto) -> str:
    kind = image.type.tensor_type.elem_type
    if kind == TensorProto.UINT8:
        return "uint8"
    found = FLOATS.get(kind)
    if found is None:
        name = TensorProto.DataType.Name(kind)
        raise UsageError(f"the graph's input {image.name!r} is {name}; Convoy gives float or uint8")
    return found


def _shape(value: onnx.ValueInfoProto) -> list[int | None]:
    """The sizes of a value's axes; None for one that is not fixed."""
    axes = value.type.tensor_type.shape.dim
    return [
        each.dim_value if each.HasField("dim_value") and each.dim_value > 0 else None
        for each in axes
    ]


def _layout(shape: list[int | None], name: str) -> Layout:
    is_first, is_last = shape[1] in (1, 3), shape[3] in (1, 3)
    if is_first == is_last:
        raise UsageError(
            f"the graph's input {name!r} has the shape {shape}; which axis are the channels? "
            "Export it with 1 or 3 channels as a fixed size"
        )
    return "NCHW" if is_first else "NHWC"


def _chosen_output(model: onnx.ModelProto, wanted: str | None) -> onnx.ValueInfoProto:
    outputs = list(model.graph.output)
    names = ", ".join(f"{each.name} {_shape(each)}" for each in outputs)
    if wanted is not None:
        outputs = [each for each in outputs if each.name == wanted]
        if not outputs:
            raise UsageError(f"the graph has no output {wanted!r}; it has {names}")
    if not outputs:
        raise UsageError("the graph has no output")
    if len(outputs) > 1:
        raise UsageError(f"the graph has several outputs; choose one with --output: {names}")
    return outputs[0]


def _output_count(output: onnx.ValueInfoProto) -> int:
    shape = _shape(output)
    sizes = [each for each in shape[1:] if each != 1]
    if len(shape) < 2 or any(each is None for each in sizes) or len(sizes) > 1:
        raise UsageError(
            f"the output {output.name!r} has the shape {shape}; Convoy needs one score for each "
            "class: (images, classes)"
        )
    return int(sizes[0] or 1) if sizes else 1


def _ends_with(model: onnx.ModelProto, output: str, *operators: str) -> bool:
    """Whether one of ``operators`` makes ``output``, perhaps through nodes that only reshape."""
    makers = {name: node for node in model.graph.node for name in node.output}
    node = makers.get(output)
    while node is not None and node.op_type in (
        "Identity",
        "Cast",
        "Reshape",
        "Squeeze",
        "Flatten",
    ):
        node = makers.get(node.input[0])
    return node is not None and node.op_type in operators
