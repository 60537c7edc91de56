"""Small ONNX graphs, as other tools write them."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 8


def weights(classes: int, channels: int = 3) -> Any:
    """float32 (channels, classes): scores that depend on the order of the channels."""
    return np.random.default_rng(3).normal(0, 2, (channels, classes)).astype(np.float32)


def classifier(
    classes: int = 3,
    *,
    layout: str = "NCHW",
    batch: int | str = "n",
    ends: str = "Softmax",
    dtype: int = TensorProto.FLOAT,
    channels: int = 3,
    more_nodes: tuple[Any, ...] = (),
    more_outputs: tuple[Any, ...] = (),
    domain: str = "",
) -> bytes:
    """Means of the channels times ``weights``; then ``ends``, if it names an operator.

    Pictures of different colours get different classes.
    """
    shape = [batch, channels, SIDE, SIDE] if layout == "NCHW" else [batch, SIDE, SIDE, channels]
    axes = [2, 3] if layout == "NCHW" else [1, 2]
    kind = np.float16 if dtype == TensorProto.FLOAT16 else np.float32
    first = 1 if isinstance(batch, int) else -1
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=axes, keepdims=0),
        helper.make_node("Reshape", ["mean", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["z"]),
        *more_nodes,
        helper.make_node(ends or "Identity", ["z"], ["y"], name="last", domain=domain),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, [batch, classes]), *more_outputs],
        [
            numpy_helper.from_array(np.array([first, channels], np.int64), "shape"),
            numpy_helper.from_array(weights(classes, channels).astype(kind), "w"),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 9
    data: bytes = model.SerializeToString()
    return data


def changed(data: bytes, change: Any) -> bytes:
    """The model in ``data`` after ``change`` was applied to it."""
    model = onnx.load_model_from_string(data)
    change(model)
    written: bytes = model.SerializeToString()
    return written


def spatial(classes: int = 3, side: int = 16) -> bytes:
    """A graph (n, 3, side, side) whose scores depend on where in the picture which colour is."""
    random = np.random.default_rng(11)
    matrix = random.normal(0, 0.3, (3 * side * side, classes)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["z"]),
            helper.make_node("Softmax", ["z"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", classes])],
        [numpy_helper.from_array(matrix, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    data: bytes = model.SerializeToString()
    return data
