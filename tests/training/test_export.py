"""The graphs that are exported for other engines, and exports that fail."""

from pathlib import Path

import numpy as np
import pytest

from registry.model.bundle import INT8_GRAPH, INT8_WEIGHTS, ONNX_GRAPH
from registry.model.classifier import Classifier
from registry.model.manifest import ListedNetwork
from registry.model.plans.base import PlanContext, find_plan
from registry.model.plans.openvino import import_openvino
from registry.model.plans.torch_eager import eager_classifier
from tests.conftest import CPU, TINY, tiny_model
from training.data.sources import Dataset
from training.fitting.loop import fit
from training.fitting.recipes import choose_recipe
from training.publishing import export
from training.publishing.evaluate import evaluate
from training.publishing.export import export_network
from training.publishing.publish import build_manifest, choose_calibration, write_version

PIXELS = np.zeros((2, 8, 8, 1), np.uint8)


def test_the_graph_is_exported_in_fp32_and_int8_without_paths_of_this_machine(
    few_digits: Dataset,
) -> None:
    preprocessed = tiny_model(few_digits, 0, TINY)
    files = export_network(preprocessed, few_digits.train.pixels[:8])
    assert set(files) == {ONNX_GRAPH, INT8_GRAPH, INT8_WEIGHTS}
    assert b".py" not in files[ONNX_GRAPH]  # from stack traces
    assert b"location" not in files[ONNX_GRAPH]  # the service refuses graphs with external data


def test_the_int8_graph_of_a_trained_network_scores_as_fp32_does(
    digits: Dataset, tmp_path: Path
) -> None:
    small = ["pool_size=1", "filters=8,16", "hidden=32", "dropout=0"]
    recipe = choose_recipe("cnn", [*small, "epochs=6", "batch_size=32", "learning_rate=0.005"])
    preprocessed = fit(recipe, digits, CPU, seed=0).preprocessed
    heldout = evaluate(eager_classifier(preprocessed, "cpu"), digits.validation)
    bundle = write_version(
        tmp_path / "bundle",
        build_manifest("digits", recipe, digits, 0, "cpu", heldout.metrics("validation")),
        preprocessed,
        digits,
        heldout,
        tmp_path,
        export_network(preprocessed, choose_calibration(digits.train)),
    )
    run = find_plan("openvino-int8").load(PlanContext(bundle))
    int8 = evaluate(Classifier(run, "openvino-int8", "cpu"), digits.validation)
    assert heldout.accuracy > 0.9
    assert abs(int8.accuracy - heldout.accuracy) < 0.01
    np.testing.assert_allclose(int8.probabilities, heldout.probabilities, rtol=0, atol=0.2)


def test_no_pair_of_8_bit_products_saturates_on_a_cpu_without_vnni(few_digits: Dataset) -> None:
    network = ListedNetwork("cnn", {"filters": [4, 8], "hidden": 16, "pool_size": 1})
    files = export_network(tiny_model(few_digits, 0, network), few_digits.train.pixels[:8])
    model = import_openvino().Core().read_model(files[INT8_GRAPH], files[INT8_WEIGHTS])
    weights = [
        node.data
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and node.get_element_type().to_string() == "i8"
    ]
    assert len(weights) == 4  # two convolutions, two dense layers
    largest = max(int(np.abs(each.astype(int)).max()) for each in weights)
    assert 2 * 255 * largest <= np.iinfo(np.int16).max


@pytest.mark.parametrize(
    ("fails", "left", "warning"),
    [
        ("_to_onnx", set(), "the network cannot be exported: no such operator"),
        ("to_int8", {ONNX_GRAPH}, "the int8 graph cannot be exported: no such operator"),
    ],
)
def test_a_graph_that_cannot_be_exported_is_left_out_with_a_warning(
    few_digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails: str,
    left: set[str],
    warning: str,
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no such operator\nand a page more")

    monkeypatch.setattr(export, fails, fail)
    assert set(export_network(tiny_model(few_digits, 0, TINY), PIXELS)) == left
    assert caplog.messages[-1] == warning
