"""Each plan gives fp32's answers within its precision; a plan that does not is rejected."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from registry.core.errors import (
    BundleInvalid,
    DeviceOutOfMemory,
    DeviceUnavailable,
    PlanUndecided,
    UsageError,
)
from registry.model.bundle import (
    GOLDEN,
    INT8_GRAPH,
    INT8_WEIGHTS,
    ONNX_GRAPH,
    WEIGHTS,
    Bundle,
    GoldenImage,
    with_manifest,
    write_bundle,
)
from registry.model.classifier import Classifier, replay_golden, softmax
from registry.model.manifest import DEFAULT_TOLERANCES, ListedNetwork, OnnxNetwork
from registry.model.plans import openvino
from registry.model.plans import planner as planner_module
from registry.model.plans.base import Outputs, PlanContext, catalogue, find_plan
from registry.model.plans.benchmark_process import PlanResult, run_benchmark
from registry.model.plans.openvino import import_openvino
from registry.model.plans.planner import Planner, refused_by_record, score
from registry.model.plans.torch_eager import EAGER
from tests.conftest import WAIT_TIMEOUT_S, MakeBundle, load_eager
from training.data.sources import Dataset

SMALL_RESNET = ListedNetwork("resnet", {"widths": [4, 8]})


@pytest.fixture
def bundle(make_bundle: MakeBundle) -> Bundle:
    """A bundle with batch norm, exports, and recorded accuracies that permit int8 and bf16."""
    made = make_bundle(network=SMALL_RESNET, export=True)
    accuracy = made.manifest.metrics["validation_accuracy"]
    plans = {"openvino-int8": accuracy, "openvino-bf16": accuracy}
    return with_manifest(made, msgspec.structs.replace(made.manifest, plan_accuracy=plans))


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    return Planner(tmp_path / "plans", "cpu", 1)


@pytest.mark.parametrize("name", catalogue())
def test_a_plan_gives_the_answers_of_fp32(name: str, bundle: Bundle, few_digits: Dataset) -> None:
    plan = find_plan(name)
    device = "cuda:0" if plan.device == "cuda" else "cpu"
    if reason := plan.unsupported(device):
        pytest.skip(reason)
    if plan.device == "cuda":
        pytest.importorskip("torch").cuda.is_available() or pytest.skip("no CUDA")
    context = PlanContext(bundle, device, threads=1)
    predict = plan.load(context)
    eager = load_eager(bundle)
    expected = eager.classify(few_digits.test.pixels)
    features = eager.predict(few_digits.test.pixels).features
    assert features is not None
    close = 1e-3 if plan.precision == "fp32" else 0.1 * np.abs(features).max()
    for size in (1, 3, 8, 64):
        outputs = predict(few_digits.test.pixels[:size])
        assert outputs.logits.dtype == np.float32
        np.testing.assert_allclose(
            softmax(outputs.logits),
            expected[:size],
            rtol=0,
            atol=DEFAULT_TOLERANCES[plan.precision],
        )
        assert outputs.features is not None
        np.testing.assert_allclose(outputs.features, features[:size], rtol=0, atol=close)


@pytest.mark.slow
def test_no_engine_sends_telemetry_to_its_makers(bundle: Bundle) -> None:
    load = (
        "import sys; from pathlib import Path; from registry.model.bundle import open_bundle;"
        "from registry.model.plans.base import PlanContext, find_plan;"
        f"context = PlanContext(open_bundle(Path({str(bundle.folder)!r})));"
        "find_plan('openvino-int8').load(context);"
    )
    export = (
        "import sys; import numpy as np; from pathlib import Path;"
        "from registry.model.bundle import open_bundle;"
        "from registry.model.preprocessed_model import load_preprocessed;"
        "from training.publishing.export import export_network;"
        f"preprocessed = load_preprocessed(open_bundle(Path({str(bundle.folder)!r})));"
        "export_network(preprocessed, np.zeros((2, 8, 8, 1), np.uint8));"
    )
    for code, with_nncf in ((export, "True"), (load, "False")):
        code += "print('nncf' in sys.modules, sys.modules['openvino_telemetry'])"
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert printed.stdout.split()[-2:] == [with_nncf, "None"], printed.stderr


@pytest.mark.slow
def test_the_fastest_correct_plan_is_chosen_and_remembered(
    bundle: Bundle,
    planner: Planner,
    few_digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with pytest.raises(PlanUndecided, match="no plan was chosen"):
        planner.load(bundle)
    found = planner.choose(bundle)
    accepted = [each for each in found.results if each.reason is None]
    assert {each.plan for each in accepted} >= {EAGER, "torch-fp32", "onnxruntime-fp32"}
    assert found.chosen == min(accepted, key=lambda each: score(each.batch_ms)).plan
    assert all(set(each.batch_ms) == {1, 8, 32} and each.peak_mb for each in accepted)
    rejected = {each.plan: each.reason for each in found.results if each.reason}
    assert rejected["cuda-fp16"] == "runs on cuda only"

    monkeypatch.setattr(subprocess, "Popen", None)  # the second choice starts no process
    again = Planner(tmp_path / "plans", "cpu", 1)
    assert again.choose(bundle) == found
    classifier = again.load(bundle)
    assert classifier.plan == found.chosen
    pixels = few_digits.test.pixels[:5]
    expected = load_eager(bundle).classify(pixels)
    np.testing.assert_allclose(classifier.classify(pixels), expected, atol=0.2)
    with pytest.raises(PlanUndecided):
        Planner(tmp_path / "plans", "cpu", 2).load(bundle)  # other threads need a new benchmark


def test_a_worker_loads_an_onnxruntime_plan_without_torch(bundle: Bundle, tmp_path: Path) -> None:
    pinned = Planner(tmp_path / "plans", "cpu", 1, "onnxruntime-fp32")
    assert pinned.choose(bundle).chosen == "onnxruntime-fp32"
    code = (
        "import sys; from pathlib import Path; from registry.model.bundle import open_bundle;"
        "from registry.model.plans.planner import Planner;"
        f"planner = Planner(Path({str(tmp_path / 'plans')!r}), 'cpu', 1, 'onnxruntime-fp32');"
        f"planner.load(open_bundle(Path({str(bundle.folder)!r})));"
        "print('torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.stdout.split() == ["False"], printed.stderr


def onnx_model(nodes: list[onnx.NodeProto], *tensors: onnx.TensorProto) -> bytes:
    pixels = helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["n", 8, 8, 1])
    scores = helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["n", 10])
    graph = helper.make_graph(nodes, "hostile", [pixels], [scores], tensors)
    opset = helper.make_opsetid("", 18)
    data: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()
    return data


def dense_model(weights: onnx.TensorProto) -> bytes:
    """A graph that flattens pixels and multiplies them by ``weights`` (64, 10)."""
    return onnx_model(
        [
            helper.make_node("Cast", ["pixels"], ["float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Flatten", ["float"], ["flat"]),
            helper.make_node("MatMul", ["flat", weights.name], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["scores"]),
        ],
        weights,
    )


def reads_a_file(location: str) -> bytes:
    weights = onnx.TensorProto(name="weights", data_type=onnx.TensorProto.FLOAT, dims=[64, 10])
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value=location)
    weights.external_data.add(key="length", value="2560")
    return dense_model(weights)


def fills_the_memory() -> bytes:
    shape = numpy_helper.from_array(np.array([1 << 20, 1 << 20]), "shape")
    return onnx_model(
        [
            helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
            helper.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=0),
            helper.make_node("Cast", ["pixels"], ["float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["float"], ["sum"], keepdims=0),
            helper.make_node("Add", ["zero", "sum"], ["scores"]),
        ],
        shape,
    )


def other_network() -> bytes:
    weights = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    return dense_model(numpy_helper.from_array(weights, "weights"))


EXTERNAL = "external-weights"  # this file exists and has the right size
HOSTILE_GRAPHS = {
    "not a graph": (b"no graph at all", ""),
    "reads a file in its folder": (reads_a_file(EXTERNAL), "refers to other files"),
    "reads a file elsewhere": (reads_a_file("/etc/passwd"), "refers to other files"),
    "takes 4 TB": (fills_the_memory(), ""),
    "of another network": (other_network(), "differs by"),
}


@pytest.mark.parametrize("name", HOSTILE_GRAPHS)
def test_a_plan_with_a_hostile_graph_is_rejected(
    name: str, make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, reason = HOSTILE_GRAPHS[name]
    monkeypatch.chdir(tmp_path)
    Path(EXTERNAL).write_bytes(bytes(2560))
    bundle = make_bundle()
    files = {each: bundle.read(each) for each in bundle.manifest.files}
    files |= {ONNX_GRAPH: graph, INT8_GRAPH: graph, INT8_WEIGHTS: bytes(640)}
    hostile = write_bundle(tmp_path / "hostile", bundle.manifest, files)
    for plan in ("onnxruntime-fp32", "openvino-fp32"):
        found = run_benchmark("try", plan, hostile, "cpu", 1).reason
        assert found
        assert reason in found
    int8 = run_benchmark("try", "openvino-int8", hostile, "cpu", 1)
    assert "is not in OpenVINO's format" in str(int8.reason)


IR = b'<?xml version="1.0"?><net name="x" version="11"><layers/><edges/></net>'


def in_openvinos_format(graph: bytes) -> bytes:
    return IR


def with_xml_in_it(graph: bytes) -> bytes:
    """Valid ONNX that OpenVINO reads as its own format if it guesses."""
    model = onnx.load_from_string(graph)
    model.producer_name = IR.decode().partition("?>")[2]
    data: bytes = model.SerializeToString()
    return data


def with_onnx_runtimes_mark(graph: bytes) -> bytes:
    """Valid ONNX that ONNX Runtime reads as its own format, ORT, if it guesses."""
    model = onnx.load_from_string(graph)
    model.producer_name = "ORTM" + "x" * 60
    data: bytes = model.SerializeToString()
    assert data[4:8] == b"ORTM"
    return data


@pytest.mark.parametrize("name", ["onnxruntime-fp32", "openvino-fp32"])
@pytest.mark.parametrize(
    ("disguise", "reason"),
    [
        (in_openvinos_format, "network.onnx: the graph is not an ONNX model"),
        (with_xml_in_it, None),
        (with_onnx_runtimes_mark, None),
    ],
)
def test_a_file_named_onnx_is_read_as_onnx_or_refused(
    bundle: Bundle,
    few_digits: Dataset,
    tmp_path: Path,
    name: str,
    disguise: Callable[[bytes], bytes],
    reason: str | None,
) -> None:
    files = {each: bundle.read(each) for each in bundle.manifest.files}
    files[ONNX_GRAPH] = disguise(files[ONNX_GRAPH])
    disguised = PlanContext(write_bundle(tmp_path / "disguised", bundle.manifest, files), threads=1)
    if reason is not None:
        with pytest.raises(BundleInvalid, match=reason):
            find_plan(name).load(disguised)
        return
    logits, _ = find_plan(name).load(disguised)(few_digits.test.pixels)
    np.testing.assert_allclose(
        softmax(logits), load_eager(bundle).classify(few_digits.test.pixels), atol=1e-3
    )


def test_a_plan_with_a_broken_int8_graph_is_rejected(bundle: Bundle, tmp_path: Path) -> None:
    files = {each: bundle.read(each) for each in bundle.manifest.files}
    files[INT8_GRAPH] = files[INT8_GRAPH][:-100]
    broken = write_bundle(tmp_path / "broken", bundle.manifest, files)
    assert run_benchmark("try", "openvino-int8", broken, "cpu", 1).reason


def test_a_version_without_exports_is_served_by_torch(
    make_bundle: MakeBundle, planner: Planner
) -> None:
    found = {each.plan: each.reason for each in planner.choose(make_bundle()).results}
    assert found["openvino-fp32"] == f"the version was published without {ONNX_GRAPH}"
    assert found[EAGER] is None


def test_a_version_with_an_onnx_network_is_served_by_engines_and_not_by_torch(
    bundle: Bundle, planner: Planner, few_digits: Dataset, tmp_path: Path
) -> None:
    files = {each: bundle.read(each) for each in bundle.manifest.files if each != WEIGHTS}
    manifest = msgspec.structs.replace(bundle.manifest, network=OnnxNetwork())
    graph = write_bundle(tmp_path / "graph", manifest, files)
    found = {each.plan: each.reason for each in planner.choose(graph).results}
    assert found[EAGER] == "the version is an ONNX graph, which torch does not run"
    assert (found["onnxruntime-fp32"], found["openvino-fp32"]) == (None, None)
    pixels = few_digits.test.pixels
    expected = load_eager(bundle).classify(pixels)
    for name in ("onnxruntime-fp32", "openvino-fp32"):
        logits, _ = find_plan(name).load(PlanContext(graph, threads=1))(pixels)
        np.testing.assert_allclose(softmax(logits), expected, atol=1e-3)
    with pytest.raises(BundleInvalid, match="torch cannot load it"):
        load_eager(graph)


def test_a_damaged_cache_entry_is_ignored(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planner = Planner(tmp_path / "plans", "cpu", 1, "torch-fp32")
    first = planner.choose(bundle)
    (file,) = (tmp_path / "plans").glob("*.json")
    file.write_text('{"chosen": 7}')
    with pytest.raises(PlanUndecided):
        planner.load(bundle)
    assert "is ignored" in caplog.text
    assert planner.choose(bundle).chosen == first.chosen


def test_a_new_version_of_an_engine_needs_a_new_benchmark(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = Planner(tmp_path / "plans", "cpu", 1, "torch-fp32")
    planner.choose(bundle)
    monkeypatch.setattr(planner_module, "_version", lambda package: "99")
    with pytest.raises(PlanUndecided):
        planner.load(bundle)


def test_a_version_for_which_no_plan_gives_the_published_scores_is_refused(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [
        GoldenImage(each.file, (0.91,) + (0.01,) * 9 if index else (0.01,) * 9 + (0.91,))
        for index, each in enumerate(bundle.golden())
    ]
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    files[GOLDEN] = msgspec.json.encode(wrong)
    broken = write_bundle(tmp_path / "broken", bundle.manifest, files)
    with pytest.raises(BundleInvalid, match=r"no plan can serve it.*torch-fp32: .*differs by"):
        Planner(tmp_path / "plans", "cpu", 1, "torch-fp32").choose(broken)
    (refusal,) = (tmp_path / "plans").glob("*.refused")
    assert not list((tmp_path / "plans").glob("*.json"))
    monkeypatch.setattr(subprocess, "Popen", None)  # another worker does not benchmark again
    with pytest.raises(BundleInvalid, match=r"no plan can serve it.*torch-fp32: .*differs by"):
        Planner(tmp_path / "plans", "cpu", 1, "torch-fp32").choose(broken)
    os.utime(refusal, (0, 0))
    with pytest.raises(TypeError):  # it benchmarks again, but Popen is None
        Planner(tmp_path / "plans", "cpu", 1, "torch-fp32").choose(broken)


def test_a_plan_whose_engine_crashes_its_process_is_rejected(
    bundle: Bundle, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[list[str]] = []
    real = subprocess.Popen

    def crash(command: Any, **options: Any) -> Any:
        plan = msgspec.json.decode(command[-1])["plan"]
        if plan == "torch-fp32" and not killed:
            killed.append(command)
            command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), 9)"]
        if plan == "onnxruntime-fp32":
            command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), 11)"]
        if plan == "openvino-fp32":
            command = [sys.executable, "-c", "exit('no such instruction')"]
        return real(command, **options)

    monkeypatch.setattr(subprocess, "Popen", crash)
    found = {each.plan: each.reason for each in planner.choose(bundle).results}
    assert found["onnxruntime-fp32"] == "its process ended with -11"
    assert found["torch-fp32"] is None  # killed once from outside, and tried again
    assert found["openvino-fp32"] == "its process ended with 1 no such instruction"
    assert found[EAGER] is None


@pytest.mark.parametrize(
    ("plan", "record", "reason"),
    [
        ("openvino-int8", {}, "recorded no held-out accuracy"),
        ("openvino-int8", {"openvino-int8": 0.8985}, "is 0.8985, that of fp32 0.9000"),
        ("openvino-int8", {"openvino-int8": 0.8995}, None),
        ("openvino-bf16", {"openvino-bf16": 0.8985}, "is 0.8985"),
        ("openvino-bf16", {}, None),
        ("torch-fp32", {}, None),
    ],
)
def test_the_accuracy_that_publishing_recorded_decides_whether_a_plan_may_serve(
    bundle: Bundle, plan: str, record: dict[str, float], reason: str | None
) -> None:
    manifest = msgspec.structs.replace(
        bundle.manifest, plan_accuracy=record, metrics={"validation_accuracy": 0.9}
    )
    found = refused_by_record(find_plan(plan), manifest)
    assert found is None if reason is None else reason in str(found)


def test_the_error_for_an_unknown_plan_lists_the_catalogue(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no plan 'fastest'; use one of: auto, .*torch-eager"):
        Planner(tmp_path, "cpu", 1, "fastest")


def test_a_plan_whose_packages_are_missing_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino.OpenVino, "packages", ("no_such_engine",))
    assert find_plan("openvino-fp32").unsupported("cpu") == "not installed: no_such_engine"


FP32 = {EAGER, "torch-fp32", "onnxruntime-fp32", "openvino-fp32"}
INT8, BF16 = {"openvino-int8"}, {"torch-bf16", "openvino-bf16"}
TRIED = {
    "none": FP32,
    "AVX2": FP32 | INT8,
    "AVX512-VNNI": FP32 | INT8 | BF16,
    "AMX": FP32 | INT8 | BF16,
    "ARM": FP32 | INT8 | BF16,
}


def test_on_each_kind_of_cpu_every_plan_with_kernels_for_it_is_benchmarked(
    cpu_kind: str, bundle: Bundle, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.Popen

    def answer(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """Answer without a benchmark, because the real CPU may not be of this kind."""
        name = msgspec.json.decode(command[-1])["plan"]
        found = PlanResult(plan=name, max_difference=0.0, batch_ms={1: 1.0})
        return real(["echo", msgspec.json.encode(found).decode()], **options)

    monkeypatch.setattr(subprocess, "Popen", answer)
    found = {each.plan: each.reason for each in planner.choose(bundle).results}
    assert {name for name, reason in found.items() if reason is None} == TRIED[cpu_kind]
    left_out = {name: found[name] for name in (INT8 | BF16) - TRIED[cpu_kind]}
    assert all("this CPU has no" in str(reason) for reason in left_out.values())


def test_the_bf16_plan_is_refused_if_openvino_would_compute_fp32(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = find_plan("openvino-bf16")
    capabilities = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" in capabilities:
        plan.load(PlanContext(bundle))
    else:
        with pytest.raises(DeviceUnavailable, match="no bf16 kernels"):
            plan.load(PlanContext(bundle))


def scored_as(bundle: Bundle, rows: list[list[float]]) -> Classifier:
    logits = np.log(np.array(rows, dtype=np.float32))
    return Classifier(lambda pixels: Outputs(logits.repeat(len(pixels), axis=0)), "fake", "cpu")


@pytest.mark.parametrize(
    ("published", "scored", "reason"),
    [
        ([0.6, 0.35], [0.46, 0.49], "1 of 1 golden images get another best class"),
        ([0.5, 0.45], [0.46, 0.49], None),  # nearly a tie
        ([0.6, 0.35], [0.3, 0.65], "differs by 0.3"),
    ],
)
def test_the_best_class_must_stay_unless_it_was_nearly_a_tie(
    bundle: Bundle, tmp_path: Path, published: list[float], scored: list[float], reason: str | None
) -> None:
    rest = [(1 - sum(published)) / 8] * 8
    golden = [GoldenImage(bundle.golden()[0].file, (*published, *rest))]
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    files[GOLDEN] = msgspec.json.encode(golden)
    one = write_bundle(tmp_path / "one", bundle.manifest, files)
    classifier = scored_as(one, [[*scored, *rest]])
    if reason is None:
        assert replay_golden(one, classifier, find_plan("openvino-int8")) < 0.2
    else:
        with pytest.raises(BundleInvalid, match=reason):
            replay_golden(one, classifier, find_plan("openvino-int8"))


class SmallDevice:
    """A device that returns each image's first byte. At most ``room`` images fit at once."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.sizes: list[int] = []

    def __call__(self, pixels: Any) -> Any:
        self.sizes.append(len(pixels))
        if len(pixels) > self.room:
            raise DeviceOutOfMemory("CUDA out of memory")
        return Outputs(pixels[:, 0, 0, :1].astype(np.float32))


@pytest.mark.parametrize(
    ("room", "on_device", "on_cpu"),
    [(8, [8], []), (4, [8, 4, 4], []), (3, [8, 4, 4], [4, 4]), (0, [8, 4, 4], [4, 4])],
)
def test_a_batch_that_does_not_fit_the_device_is_halved_once_and_then_goes_to_the_cpu(
    room: int, on_device: list[int], on_cpu: list[int]
) -> None:
    device, cpu = SmallDevice(room), SmallDevice(99)
    classifier = Classifier(device, "fake", "cpu", Classifier(cpu, "fake", "cpu"))
    pixels = np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1)
    np.testing.assert_array_equal(classifier.predict(pixels).logits[:, 0], range(8))
    assert (device.sizes, cpu.sizes) == (on_device, on_cpu)


def test_a_plan_that_is_wrong_at_one_batch_size_only_is_refused(bundle: Bundle) -> None:
    right = load_eager(bundle)

    def wrong_when_alone(pixels: Any) -> Any:
        return Outputs(np.zeros((1, 10), "f4")) if len(pixels) == 1 else right.predict(pixels)

    with pytest.raises(BundleInvalid, match=r"in a batch of 1: a score differs by"):
        replay_golden(bundle, Classifier(wrong_when_alone, "fake", "cpu"), find_plan(EAGER))


def test_one_image_that_does_not_fit_the_device_goes_to_the_cpu() -> None:
    classifier = Classifier(SmallDevice(0), "fake", "cpu", Classifier(SmallDevice(9), "f", "cpu"))
    outputs = classifier.predict(np.full((1, 1, 1, 1), 7, dtype=np.uint8))
    assert outputs.logits.tolist() == [[7.0]]


def test_without_a_fallback_a_batch_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(DeviceOutOfMemory):
        Classifier(SmallDevice(0), "fake", "cpu").classify(np.zeros((1, 1, 1, 1), dtype=np.uint8))


def test_a_benchmark_that_hangs_is_killed_with_all_processes_that_it_started(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.Popen
    code = "import subprocess, signal; signal.alarm(1); subprocess.run(['sleep', '3600'])"
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda command, **options: (
            real([sys.executable, "-c", code], **options)
            if "-m" in command
            else real(command, **options)
        ),
    )
    started = time.monotonic()
    with pytest.raises(BundleInvalid, match=r"torch-fp32: it took more than 300 s to try"):
        Planner(tmp_path / "plans", "cpu", 1, "torch-fp32").choose(bundle)
    assert time.monotonic() - started < WAIT_TIMEOUT_S  # it did not wait for the child process


def make_folder(entry: Path) -> None:
    (entry / "choice").mkdir(parents=True)


def link_to_a_choice(entry: Path) -> None:
    entry.symlink_to(entry.with_name("elsewhere"))


def fill(entry: Path) -> None:
    entry.write_bytes(b" " * 1_000_000 + entry.with_name("elsewhere").read_bytes())


@pytest.mark.parametrize("make", [make_folder, link_to_a_choice, os.mkfifo, fill])
@pytest.mark.slow
def test_a_folder_link_pipe_or_huge_file_in_place_of_a_cache_entry_is_replaced(
    bundle: Bundle, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    planner = Planner(tmp_path / "plans", "cpu", 1, "torch-fp32")
    planner.choose(bundle)
    (entry,) = (tmp_path / "plans").glob("*.json")
    entry.rename(entry.with_name("elsewhere"))
    make(entry)
    with pytest.raises(PlanUndecided):
        planner.load(bundle)
    planner.choose(bundle)
    assert planner.load(bundle).plan == "torch-fp32"


@pytest.mark.slow
def test_cache_entries_that_were_not_used_for_long_are_removed(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner_module, "CACHE_ENTRIES", 1)
    plans = tmp_path / "plans"
    Planner(plans, "cpu", 1, "torch-fp32").choose(bundle)
    newer = Planner(plans, "cpu", 2, "torch-fp32")
    newer.choose(bundle)
    assert len(list(plans.glob("*.json"))) == 1
    assert newer.load(bundle).plan == "torch-fp32"


def test_a_cache_that_cannot_be_written_is_replaced_for_this_process(
    bundle: Bundle,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").write_text("no folder")
    planner = Planner(tmp_path / "file", "cpu", 1, "torch-fp32")
    planner.choose(bundle)
    assert planner.load(bundle).plan == "torch-fp32"
    assert "cannot be written" in caplog.text
    other_worker = Planner(tmp_path / "file", "cpu", 1, "torch-fp32")
    assert other_worker.load(bundle).plan == "torch-fp32"
    (folder,) = tmp_path.glob("convoy-plans-*")
    folder.chmod(0o777)  # now any user may have written to it
    with pytest.raises(PlanUndecided):
        Planner(tmp_path / "file", "cpu", 1, "torch-fp32").load(bundle)


def test_serving_files_include_the_weights_and_the_graphs(bundle: Bundle) -> None:
    assert {WEIGHTS, ONNX_GRAPH, INT8_GRAPH, INT8_WEIGHTS} <= set(bundle.serving_files())
