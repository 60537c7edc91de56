"""The rules for an ONNX graph that Convoy runs, checked on the bytes that an engine will read.

A graph has standard operators only, carries all of its weights, and has neither control flow nor
functions. Its nodes stand in the order in which they run. So it refers to no other file, has no
loop, and an engine reads no more than these bytes.

Source of the field numbers: the file onnx.proto of ONNX 1.23.
"""

import math
from collections import defaultdict

from registry.core.errors import BundleInvalid
from registry.model.graphs.onnx_tensor import (
    MAX_CONSTANT_VALUES,
    Fields,
    check_tensor,
    numbers,
    text_of,
    texts_of,
)
from registry.model.graphs.wire import Malformed, fields

MAX_GRAPH_BYTES = 1_000_000_000
MAX_NODES = 20_000
# Fields of messages, apart from weights and lists of numbers. Each takes a microsecond.
MAX_FIELDS = 400_000
# Values that one constant may make a node create, such as the shape of ConstantOfShape.
MAX_CREATED_VALUES = 1 << 26
STANDARD_DOMAINS = ("", "ai.onnx")
# Operators whose output is as large as a value of an input says → the place of that input.
CREATORS = {
    "ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Range": 1, "Pad": 1, "Resize": 3, "OneHot": 1,
}  # fmt: skip
# The fields of onnx.proto's messages that the rules look at.
MODEL_GRAPH, MODEL_OPSETS, MODEL_TRAINING, MODEL_FUNCTIONS = 7, 8, 20, 25
GRAPH_NODES, GRAPH_WEIGHTS, GRAPH_INPUTS, GRAPH_SPARSE = 1, 5, 11, 15
NODE_INPUTS, NODE_OUTPUTS, NODE_NAME, NODE_OPERATOR, NODE_ATTRIBUTES, NODE_DOMAIN = 1, 2, 3, 4, 5, 7
ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS, ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
ATTRIBUTE_NUMBERS = (3, 8)


def check_onnx(data: bytes) -> None:
    """Check all rules.

    Raises:
        BundleInvalid: ``data`` breaks a rule, or is not an ONNX model; the text names the rule and
            the node or tensor.
    """
    if len(data) > MAX_GRAPH_BYTES:
        raise BundleInvalid(f"the graph has {len(data):,} bytes; at most {MAX_GRAPH_BYTES:,}")
    try:
        _Reader().check(memoryview(data))
    except Malformed as error:
        raise BundleInvalid(f"the graph is not an ONNX model: {error}") from error


class _Reader:
    """Walks one model once, and raises ``BundleInvalid`` at the first broken rule."""

    def __init__(self) -> None:
        self._read = 0
        self._known = {""}  # an optional input that is absent has no name
        # The values of short tensors of whole numbers, by name.
        self._constants: dict[str, tuple[int, ...]] = {}

    def check(self, data: memoryview) -> None:
        model = self._fields(data)
        for number, what in ((MODEL_TRAINING, "training steps"), (MODEL_FUNCTIONS, "functions")):
            if number in model:
                raise BundleInvalid(f"the graph has {what}; export it without them")
        graphs = [each for each in model.get(MODEL_GRAPH, ()) if isinstance(each, memoryview)]
        # The model may name domains of operators that no node uses, as tf2onnx does.
        if len(graphs) != 1 or MODEL_OPSETS not in model:
            raise Malformed("it needs one graph and an opset")
        self._check_graph(self._fields(graphs[0]))

    def _fields(self, message: memoryview) -> Fields:
        """The fields of ``message`` by number; ``BundleInvalid`` if the model has too many."""
        found: defaultdict[int, list[int | memoryview]] = defaultdict(list)
        for number, value in fields(message):
            self._read += 1
            if self._read > MAX_FIELDS:
                raise BundleInvalid(f"the graph has more than {MAX_FIELDS:,} fields")
            found[number].append(value)
        return found

    def _message(self, value: int | memoryview) -> Fields:
        if isinstance(value, int):
            raise Malformed("a number stands where a message must be")
        return self._fields(value)

    def _check_graph(self, graph: Fields) -> None:
        if GRAPH_SPARSE in graph:
            raise BundleInvalid("the graph has sparse weights; export it with dense ones")
        for weight in graph.get(GRAPH_WEIGHTS, ()):
            tensor = self._message(weight)
            name = text_of(tensor, 8)
            if name in self._known:
                raise BundleInvalid(f"the graph has two tensors {name[:80]!r}")
            self._known.add(name)
            self._remember(name, check_tensor(tensor))
        for each in graph.get(GRAPH_INPUTS, ()):
            self._known.add(text_of(self._message(each), 1))
        nodes = graph.get(GRAPH_NODES, ())
        if len(nodes) > MAX_NODES:
            raise BundleInvalid(f"the graph has {len(nodes):,} nodes; at most {MAX_NODES:,}")
        for each in nodes:
            self._check_node(self._message(each))

    def _check_node(self, node: Fields) -> None:
        operator = text_of(node, NODE_OPERATOR)
        where = f"node {text_of(node, NODE_NAME)[:80]!r} ({operator[:40]})"
        _check_domain(text_of(node, NODE_DOMAIN), where)
        inputs, outputs = texts_of(node, NODE_INPUTS), texts_of(node, NODE_OUTPUTS)
        for attribute in node.get(NODE_ATTRIBUTES, ()):
            values = self._check_attribute(self._message(attribute), where)
            if operator == "Constant" and outputs:
                self._remember(outputs[0], values)
        for each in inputs:
            if each not in self._known:
                raise BundleInvalid(
                    f"{where} reads {each[:80]!r}, which no earlier node makes: the graph has a "
                    "cycle, or its nodes are not in their order"
                )
        self._check_created(operator, inputs, where)
        for each in filter(None, outputs):
            if each in self._known:
                raise BundleInvalid(f"{where} makes {each[:80]!r}, which is already made")
            self._known.add(each)

    def _check_attribute(self, attribute: Fields, where: str) -> tuple[int, ...] | None:
        """The values of an attribute, if they are few whole numbers."""
        if any(number in attribute for number in ATTRIBUTE_GRAPHS):
            raise BundleInvalid(
                f"{where} holds a graph: control flow is not accepted; export the model without "
                "If, Loop and Scan"
            )
        if any(number in attribute for number in ATTRIBUTE_SPARSE):
            raise BundleInvalid(f"{where} has a sparse tensor; export it with dense ones")
        listed = [each for number in ATTRIBUTE_NUMBERS for each in attribute.get(number, ())]
        values = tuple(numbers(listed, MAX_CONSTANT_VALUES)) or None
        for number in ATTRIBUTE_TENSORS:
            for each in attribute.get(number, ()):
                values = check_tensor(self._message(each))
        return values

    def _remember(self, name: str, values: tuple[int, ...] | None) -> None:
        if values is not None:
            self._constants[name] = values

    def _check_created(self, operator: str, inputs: list[str], where: str) -> None:
        """Refuse a node whose constant makes it create an array of absurd size."""
        place = CREATORS.get(operator)
        values = None if place is None else self._constants.get("".join(inputs[place : place + 1]))
        if not values:
            return
        sizes = [max(1, abs(each)) for each in values]
        created = max(sizes) ** 2 if operator == "Pad" else math.prod(sizes)
        if created > MAX_CREATED_VALUES:
            raise BundleInvalid(f"{where} would make {created:,} values from {list(values[:8])}")


def _check_domain(domain: str, where: str) -> None:
    if domain not in STANDARD_DOMAINS:
        raise BundleInvalid(
            f"{where} uses operators of {domain[:80]!r}; only ONNX's own are accepted"
        )
