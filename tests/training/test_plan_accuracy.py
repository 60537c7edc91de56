"""Each plan below fp32 is scored once, in a process of its own that may crash."""

import subprocess
import sys
from typing import Any

import msgspec
import pytest

from registry.model.manifest import ListedNetwork
from registry.model.plans.benchmark_process import PlanResult
from tests.conftest import MakeBundle
from training.data.sources import Dataset
from training.publishing.plan_accuracy import record_plan_accuracy


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_with_everything")
def test_an_engine_that_crashes_while_it_is_measured_does_not_end_the_publisher(
    make_bundle: MakeBundle,
    few_digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = make_bundle(network=ListedNetwork("resnet", {"widths": [4, 8]}), export=True)
    real = subprocess.Popen

    def crash(command: Any, **options: Any) -> Any:
        job = msgspec.json.decode(command[-1])
        if job["plan"] == "openvino-bf16":
            command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), 4)"]
        return real(command, **options)

    monkeypatch.setattr(subprocess, "Popen", crash)
    heldout = few_digits.validation
    recorded = record_plan_accuracy(bundle, heldout.pixels, heldout.labels, "cpu").manifest
    assert set(recorded.plan_accuracy) == {"torch-bf16", "openvino-int8"}
    fp32 = recorded.metrics["validation_accuracy"]
    assert all(abs(accuracy - fp32) < 0.1 for accuracy in recorded.plan_accuracy.values())
    assert "openvino-bf16 cannot be measured: its process ended with -4" in caplog.text


MEASURED = {
    "none": set(),
    "AVX2": {"openvino-int8"},
    "AVX512-VNNI": {"openvino-int8", "openvino-bf16", "torch-bf16"},
    "AMX": {"openvino-int8", "openvino-bf16", "torch-bf16"},
    "ARM": {"openvino-int8", "openvino-bf16", "torch-bf16"},
}


def test_every_plan_below_fp32_is_measured_if_this_kind_of_cpu_has_kernels_for_it(
    cpu_kind: str,
    make_bundle: MakeBundle,
    few_digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = make_bundle(export=True)
    real = subprocess.Popen

    def answer(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """Print a result without running the benchmark: the real CPU may be of another kind."""
        found = PlanResult(plan=msgspec.json.decode(command[-1])["plan"], accuracy=0.5)
        return real(["echo", msgspec.json.encode(found).decode()], **options)

    monkeypatch.setattr(subprocess, "Popen", answer)
    heldout = few_digits.validation
    recorded = record_plan_accuracy(bundle, heldout.pixels, heldout.labels, "cpu").manifest
    assert set(recorded.plan_accuracy) == MEASURED[cpu_kind]
