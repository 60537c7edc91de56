"""What is exported for other engines, and that a version is published without what cannot be."""

import numpy as np
import pytest

from registry.bundle import INT8_GRAPH, INT8_WEIGHTS, ONNX_GRAPH
from tests.conftest import TINY, tiny_program
from training import export
from training.datasets import Dataset
from training.export import export_network

PIXELS = np.zeros((2, 8, 8, 1), np.uint8)


def test_the_graph_comes_in_fp32_and_int8_without_paths_of_this_machine(
    few_digits: Dataset,
) -> None:
    program = tiny_program(few_digits, 0, TINY)
    files = export_network(program, few_digits.train.pixels[:8])
    assert set(files) == {ONNX_GRAPH, INT8_GRAPH, INT8_WEIGHTS}
    assert b".py" not in files[ONNX_GRAPH]  # of stack traces
    assert b"location" not in files[ONNX_GRAPH]  # what serving refuses


@pytest.mark.parametrize(
    ("fails", "left", "said"),
    [
        ("_to_onnx", set(), "the network cannot be exported: no such operator"),
        ("_to_int8", {ONNX_GRAPH}, "no int8: no such operator"),
    ],
)
def test_what_cannot_be_exported_is_left_out(
    few_digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails: str,
    left: set[str],
    said: str,
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no such operator\nand a page more")

    monkeypatch.setattr(export, fails, fail)
    assert set(export_network(tiny_program(few_digits, 0, TINY), PIXELS)) == left
    assert caplog.messages[-1] == said
