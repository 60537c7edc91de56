import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from registry.core import devices
from registry.core.devices import choose_device, describe_device, device_errors
from registry.core.errors import DeviceLost, DeviceOutOfMemory, DeviceUnavailable, UsageError

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def test_the_cpu_is_always_available() -> None:
    assert describe_device(choose_device("cpu")) == "cpu"


@pytest.mark.parametrize("wanted", ["gpu", "cuda:x", "tpu", ""])
def test_an_unknown_device_is_refused(wanted: str) -> None:
    with pytest.raises(UsageError, match="auto, cpu, cuda"):
        choose_device(wanted)


@without_cuda
def test_asking_for_cuda_by_name_is_an_error_on_a_machine_without_it() -> None:
    with pytest.raises(DeviceUnavailable, match="cuda cannot run a kernel"):
        choose_device("cuda")


@without_cuda
def test_auto_is_the_cpu_on_a_machine_without_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_device("auto") == "cpu"
    assert not caplog.records


@without_cuda
def test_auto_warns_of_a_gpu_driver_that_this_torch_cannot_use(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "_has_driver", lambda: True)
    assert choose_device("auto") == "cpu"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no torch that can use it" in caplog.text


def test_auto_is_the_cpu_without_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "_has_driver", lambda: True)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert choose_device("auto") == "cpu"
    assert "no torch that can use it" in caplog.text
    with pytest.raises(DeviceUnavailable, match="cuda cannot run a kernel"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("quota", "expected"), [("50000 100000", 1), ("99900000 100000", None), ("max 100000", None)]
)
def test_a_containers_quota_limits_the_cores(
    tmp_path: Path, quota: str, expected: int | None
) -> None:
    by_affinity = len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert devices.cores(tmp_path / "cpu.max") == (expected or by_affinity)
    assert devices.cores(tmp_path / "none") == by_affinity


@pytest.mark.parametrize(
    ("raised", "becomes", "text"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has …"),
            DeviceOutOfMemory,
            "^CUDA out of memory$",
        ),
        (
            torch.AcceleratorError("CUDA error: an illegal memory access\nCompile with …"),
            DeviceLost,
            "^CUDA error: an illegal memory access$",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), DeviceLost, "^cuDNN error"),
        (RuntimeError("shapes cannot be multiplied"), RuntimeError, "^shapes"),
    ],
)
def test_torchs_gpu_errors_become_out_of_memory_or_device_lost(
    raised: Exception, becomes: type[Exception], text: str
) -> None:
    @device_errors()
    def forward_pass() -> None:
        raise raised

    with pytest.raises(becomes, match=text):
        forward_pass()


def broken_driver(device: str) -> None:
    raise RuntimeError("CUDA error: no kernel image is available\nand a second line")


def test_auto_falls_back_with_one_warning_when_the_kernel_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "_run_kernel", broken_driver)
    with caplog.at_level(logging.WARNING):
        assert choose_device("auto") == "cpu"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no kernel image" in caplog.text
    assert "second line" not in caplog.text


def test_a_device_that_computes_a_wrong_sum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real_conv2d = functional.conv2d
    monkeypatch.setattr(functional, "conv2d", lambda *args: torch.zeros_like(real_conv2d(*args)))
    with pytest.raises(RuntimeError, match="instead of 36"):
        devices._run_kernel("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA")
def test_auto_is_the_gpu_if_it_works() -> None:
    device = choose_device("auto")
    assert device.startswith("cuda:")
    assert describe_device(device).startswith("cuda:0 (")
