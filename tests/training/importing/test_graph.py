"""Foreign graphs become graphs of bundles, with the same answers."""

import time
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from registry.core.errors import BundleInvalid, UsageError
from registry.model.classifier import softmax
from registry.model.manifest import PreprocessSpec
from tests.training.importing.graphs import SIDE, changed, classifier
from training.importing.graph import adapt, describe, read_graph
from training.importing.owner import OwnerGraph
from training.importing.preprocess_file import make_spec

PIXELS = np.random.default_rng(5).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
SPEC = PreprocessSpec(
    mode="RGB", width_px=SIDE, height_px=SIDE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
)


def run(graph: bytes, pixels: Any) -> Any:
    """The logits of the graph of a bundle."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session.run(None, {"pixels": pixels})[0]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("ends", ["Softmax", ""])
@pytest.mark.parametrize("batch", ["n", 1])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_a_bundles_graph_gives_the_owners_probabilities_for_every_batch(
    layout: str, ends: str, batch: int | str, dtype: int
) -> None:
    data = classifier(layout=layout, ends=ends, batch=batch, dtype=dtype)
    model = read_graph(data)
    facts = describe(model)
    assert facts.scores == ("probabilities" if ends else "logits")
    assert facts.batch == (1 if batch == 1 else None)
    expected = OwnerGraph(data, facts, facts.scores).probabilities(PIXELS, SPEC)
    found = softmax(run(adapt(model, facts, SPEC, facts.scores), PIXELS))
    tolerance = 2e-3 if dtype == TensorProto.FLOAT16 else 1e-5
    np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize("ends", ["Sigmoid", ""])
def test_one_score_becomes_two_classes(ends: str) -> None:
    data = classifier(1, ends=ends)
    model = read_graph(data)
    facts = describe(model)
    owner = OwnerGraph(data, facts, facts.scores).probabilities(PIXELS, SPEC)
    assert owner.shape == (3, 2)
    np.testing.assert_allclose(owner.sum(axis=1), 1, atol=1e-6)
    found = softmax(run(adapt(model, facts, SPEC, facts.scores), PIXELS))
    np.testing.assert_allclose(found, owner, atol=1e-5)


def test_one_of_several_outputs_is_chosen() -> None:
    more = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 3])
    model = read_graph(classifier(more_outputs=(more,)))
    with pytest.raises(UsageError, match=r"--output: y \[None, 3\], z \[None, 3\]"):
        describe(model)
    assert describe(model, "z").scores == "logits"
    with pytest.raises(UsageError, match="no output 'a'"):
        describe(model, "a")


def with_input(shape: list[Any], kind: int = TensorProto.FLOAT) -> bytes:
    """A graph whose input has ``shape``; its output is of no use."""

    def change(model: Any) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", kind, shape))

    return changed(classifier(), change)


@pytest.mark.parametrize(
    ("shape", "text"),
    [(["n", 4, SIDE, SIDE], "which axis"), (["n", 3, SIDE, 3], "which axis")],
)
def test_an_input_that_is_no_picture_is_refused(shape: list[Any], text: str) -> None:
    with pytest.raises((UsageError, BundleInvalid), match=text):
        describe(read_graph(with_input(shape)))


def test_whole_numbers_are_no_picture() -> None:
    with pytest.raises((UsageError, BundleInvalid), match=r"INT64|int64"):
        describe(read_graph(with_input(["n", 3, SIDE, SIDE], TensorProto.INT64)))


def test_a_graph_that_is_not_valid_is_refused() -> None:
    def change(model: Any) -> None:
        model.graph.node[-1].op_type = "NoSuchOperator"

    with pytest.raises(BundleInvalid, match="NoSuchOperator"):
        read_graph(changed(classifier(), change))


def test_a_result_that_only_its_shape_shows_to_be_huge_is_refused_at_once() -> None:
    """Two weights of 4 MB, whose product has 10¹² values."""
    long = np.zeros((1_000_000, 1), np.float32)
    nodes = [
        helper.make_node("MatMul", ["column", "row"], ["huge"]),
        helper.make_node("ReduceMax", ["huge"], ["most"], keepdims=0),
        helper.make_node("Add", ["x", "most"], ["sum"]),
        helper.make_node("ReduceMean", ["sum"], ["y"], axes=[2, 3], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(long, "column"), numpy_helper.from_array(long.T, "row")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    data = model.SerializeToString()
    started = time.perf_counter()
    with pytest.raises(BundleInvalid, match=r"'huge' of 1,000,000,000,000 values"):
        read_graph(data)
    assert time.perf_counter() - started < 5  # 0.05 s on a machine that has time


def test_a_graph_that_the_engine_cannot_run_is_refused() -> None:
    data = classifier(batch=1)
    facts = describe(read_graph(data))
    owner = OwnerGraph(data, facts, facts.scores)
    with pytest.raises(BundleInvalid, match="ONNX Runtime cannot run the graph"):
        owner.probabilities(np.zeros((1, 4, 4, 3), np.uint8), make_spec({"size": 4}))


def test_a_reshape_of_a_weight_stays_as_it_is() -> None:
    """In a graph that takes one picture, whose Reshapes of the picture take any batch."""
    nodes = [
        helper.make_node("Reshape", ["bias", "shape"], ["wide"]),
        helper.make_node("Add", ["x", "wide"], ["sum"]),
        helper.make_node("ReduceMean", ["sum"], ["y"], axes=[2, 3], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [
            numpy_helper.from_array(np.array([1, 2, 3], np.float32), "bias"),
            numpy_helper.from_array(np.array([1, 3, 1, 1], np.int64), "shape"),
        ],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    read = read_graph(model.SerializeToString())
    assert run(adapt(read, describe(read), SPEC, "logits"), PIXELS).shape == (3, 3)
