"""Hostile and unusual ONNX graphs: each is refused for its reason, at once, in little memory."""

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from registry.core.errors import BundleInvalid
from registry.model.graphs import onnx_rules
from registry.model.graphs.onnx_rules import check_onnx
from tests.training.importing.graphs import changed, classifier

Change = Callable[[Any], None]


def external(model: Any) -> None:
    tensor = model.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"


def only_the_entry(model: Any) -> None:
    entry = model.graph.initializer[1].external_data.add()
    entry.key, entry.value = "location", "weights.bin"


def claims_much(model: Any) -> None:
    model.graph.initializer[1].dims[:] = [1 << 20, 1 << 20]


def claims_negative(model: Any) -> None:
    model.graph.initializer[1].dims[:] = [-3, -3]


def hides_an_axis(model: Any) -> None:
    model.graph.initializer[1].dims[:] = [1] * 64 + [1 << 40]


def has_two_of_one_name(model: Any) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def fills_from_a_list(model: Any) -> None:
    model.graph.node.append(
        helper.make_node("Constant", [], ["sizes"], value_ints=[1 << 20, 1 << 20])
    )
    model.graph.node.append(helper.make_node("ConstantOfShape", ["sizes"], ["filled"]))


def has_fewer(model: Any) -> None:
    model.graph.initializer[1].ClearField("raw_data")


def cycle(model: Any) -> None:
    model.graph.node[0].input[0] = "y"


def unordered(model: Any) -> None:
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def made_twice(model: Any) -> None:
    model.graph.node[-1].output[0] = "mean"


def loops(model: Any) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], ["forever"], body=body))


def nested_deeply(model: Any) -> None:
    body = helper.make_graph([], "body", [], [])
    for _ in range(20):
        body = helper.make_graph(
            [helper.make_node("If", ["c"], ["o"], then_branch=body)], "b", [], []
        )
    model.graph.node.append(helper.make_node("If", ["x"], ["deep"], then_branch=body))


def functions(model: Any) -> None:
    model.functions.append(
        helper.make_function("own", "F", [], [], [], [helper.make_opsetid("", 17)])
    )


def sparse(model: Any) -> None:
    model.graph.sparse_initializer.add()


def fills(model: Any) -> None:
    shape = numpy_helper.from_array(np.array([1 << 20, 1 << 20], np.int64), "huge")
    model.graph.initializer.append(shape)
    model.graph.node.append(helper.make_node("ConstantOfShape", ["huge"], ["filled"]))


def tiles(model: Any) -> None:
    repeats = numpy_helper.from_array(np.array([1 << 30, 1 << 30], np.int64))
    model.graph.node.append(helper.make_node("Constant", [], ["often"], value=repeats))
    model.graph.node.append(helper.make_node("Tile", ["mean", "often"], ["tiled"]))


def many_nodes(model: Any) -> None:
    for number in range(onnx_rules.MAX_NODES):
        model.graph.node.append(helper.make_node("Identity", ["x"], [f"i{number}"]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (external, "refers to other files"),
        (only_the_entry, "refers to other files"),
        (claims_much, "claims the shape"),
        (claims_negative, "claims the shape"),
        (hides_an_axis, "claims the shape"),
        (has_fewer, "fewer values"),
        (has_two_of_one_name, "two tensors"),
        (fills_from_a_list, "would make"),
        (cycle, "cycle"),
        (unordered, "order"),
        (made_twice, "already made"),
        (loops, "control flow"),
        (nested_deeply, "control flow"),
        (functions, "functions"),
        (sparse, "sparse"),
        (fills, "would make"),
        (tiles, "would make"),
        (many_nodes, "nodes"),
    ],
)
def test_a_hostile_graph_is_refused_for_its_reason(change: Change, text: str) -> None:
    with pytest.raises(BundleInvalid, match=text):
        check_onnx(changed(classifier(), change))


def test_a_tag_that_engines_would_cut_to_another_field_is_refused() -> None:
    """Field 13 + 2²⁹ is external data for a parser that keeps 32 bits of a tag."""
    tag = ((13 + (1 << 29)) << 3) | 2
    varint = bytes((tag >> shift & 0x7F) | 0x80 for shift in range(0, 28, 7)) + bytes([tag >> 28])
    with pytest.raises(BundleInvalid, match="more than 32 bits"):
        check_onnx(varint + b"\x00" + classifier())


def test_operators_of_other_domains_are_refused() -> None:
    with pytest.raises(BundleInvalid, match=r"operators of 'com\.microsoft'"):
        check_onnx(classifier(domain="com.microsoft"))


@pytest.mark.parametrize(
    "data", [b"", b"\x08", b"PK\x03\x04", b"<?xml", b"\x3a\xff\xff\xff\xff\x07", b"\xff" * 30]
)
def test_what_is_no_onnx_model_is_refused(data: bytes) -> None:
    with pytest.raises(BundleInvalid, match="not an ONNX model"):
        check_onnx(data)


def test_a_name_of_a_megabyte_and_an_empty_number_are_refused() -> None:
    def long(model: Any) -> None:
        model.graph.node[0].name = "n" * 1_000_000

    with pytest.raises(BundleInvalid, match="a name has more than"):
        check_onnx(changed(classifier(), long))
    tensor = b"\x12\x00" + b"\x42\x01t"  # a data type of no bytes, and a name
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    with pytest.raises(BundleInvalid):
        check_onnx(b"\x42\x02\x10\x11\x3a" + bytes([len(graph)]) + graph)


def test_every_truncated_graph_is_refused() -> None:
    data = classifier()
    for end in range(len(data)):
        with pytest.raises(BundleInvalid):
            check_onnx(data[:end])


def test_many_small_fields_are_refused_at_once_and_in_little_memory() -> None:
    data = classifier() + b"\x28\x01" * 10_000_000  # the model's version, ten million times
    tracemalloc.start()
    started = time.thread_time()
    try:
        with pytest.raises(BundleInvalid, match="fields"):
            check_onnx(data)
        assert time.thread_time() - started < 20  # 0.4 s of the CPU without tracemalloc
        assert tracemalloc.get_traced_memory()[1] < 64_000_000
    finally:
        tracemalloc.stop()


def test_graphs_of_other_tools_are_accepted() -> None:
    for ends in ("Softmax", "Sigmoid", ""):
        check_onnx(classifier(ends=ends))
    check_onnx(classifier(layout="NHWC", dtype=TensorProto.FLOAT16, batch=1))
