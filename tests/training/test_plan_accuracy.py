"""What each plan below fp32 scores, found out once; an engine that crashes costs itself only."""

import subprocess
import sys

import msgspec
import pytest

from registry.contract import NetworkSpec
from registry.devices import BF16_FLAGS, INT8_FLAGS
from tests.conftest import MakeBundle
from training.datasets import Dataset
from training.plan_accuracy import record_plan_accuracy


def test_held_out_accuracy_is_measured_without_risk_to_who_publishes(
    make_bundle: MakeBundle,
    few_digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = make_bundle(network=NetworkSpec("resnet", {"widths": [4, 8]}), export=True)
    monkeypatch.setattr("registry.plans.plan.cpu_flags", lambda: BF16_FLAGS | INT8_FLAGS)
    real = subprocess.Popen

    def crash(command, **options):
        job = msgspec.json.decode(command[-1])
        if job["step"] == "score" and job["plans"] == ["openvino-bf16"]:
            command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), 4)"]
        return real(command, **options)

    monkeypatch.setattr(subprocess, "Popen", crash)
    heldout = few_digits.validation
    recorded = record_plan_accuracy(bundle, heldout.pixels, heldout.labels, "cpu").manifest
    assert set(recorded.plan_accuracy) == {"torch-bf16", "openvino-int8"}
    fp32 = recorded.metrics["validation_accuracy"]
    assert all(abs(accuracy - fp32) < 0.1 for accuracy in recorded.plan_accuracy.values())
    assert "openvino-bf16 cannot be measured: its process ended with -4" in caplog.text
