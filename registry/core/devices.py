"""Chooses and describes the device of a network, for training, publishing and serving alike.

Torch is imported only if there may be a GPU, so a worker whose plan does without torch never
loads it.
"""

import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from registry.core.errors import DeviceLost, DeviceOutOfMemory, DeviceUnavailable, UsageError

log = logging.getLogger(__name__)


def cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use, by its affinity and its container's quota (cgroup v2)."""
    by_affinity = len(os.sched_getaffinity(0))
    try:
        allowed, period = quota.read_text().split()
        return min(by_affinity, math.ceil(int(allowed) / int(period)))
    except (OSError, ValueError):  # no container, or one whose quota is "max"
        return by_affinity


CORES = cores()

# Files in /dev that a GPU's driver creates: NVIDIA's, AMD's, and Windows' in WSL.
_DRIVER_NODES = ("nvidiactl", "kfd", "dxg")
_GPU_LIBRARIES = ("CUDA", "cuDNN", "cuBLAS")
# CPU flags, by Linux's names. An engine has kernels in a precision only if the CPU has at least one
# of these flags. The benchmark times whether they are faster than fp32. The last of each is ARM's.
# On a CPU with AVX2 alone there are no bf16 kernels. OpenVINO computes fp32 instead. torch falls
# back to loops: ResNet-18 was 6 times slower than in fp32 and took 161 s to benchmark
# (docs/decisions/0006).
BF16_FLAGS = frozenset({"avx512bw", "avx_ne_convert", "bf16"})
INT8_FLAGS = frozenset({"avx2", "asimddp"})


def serving_threads(environment: Mapping[str, str] = os.environ) -> int:
    """Threads of one forward pass in a service with these settings.

    Raises:
        UsageError: ``CONVOY_WORKERS`` is not a whole number above 0.
    """
    text = environment.get("CONVOY_WORKERS") or str(CORES)
    if not text.isdecimal() or not int(text):
        raise UsageError(f"CONVOY_WORKERS is {text!r}; set it to a whole number above 0")
    return forward_threads(int(text))


def forward_threads(workers: int) -> int:
    """Threads of one forward pass when ``workers`` share the cores. More collapse under load."""
    return max(1, CORES // workers)


def may_use_gpu(wanted: str) -> bool:
    """Whether ``choose_device`` may return a GPU. Only torch can tell for certain."""
    return wanted != "cpu" and (wanted != "auto" or _has_driver())


def choose_device(wanted: str = "auto") -> str:
    """The device to run on, ``cpu`` or ``cuda:N``. A GPU is returned only after it ran a kernel.

    Args:
        wanted: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``. ``auto`` is CUDA if it works, else the
            CPU, with one warning if a GPU is present but cannot be used.

    Raises:
        DeviceUnavailable: ``wanted`` names a GPU, and it cannot run a kernel.
        UsageError: ``wanted`` has another form.
    """
    if not may_use_gpu(wanted):
        return "cpu"
    kind, _, index = wanted.partition(":")
    if wanted != "auto" and (kind != "cuda" or (index and not index.isdigit())):
        raise UsageError(f"device {wanted!r} is not known; use auto, cpu, cuda or cuda:N")
    try:
        import torch

        usable = torch.cuda.is_available()
    except ImportError:
        usable = False
    if wanted == "auto" and not usable:
        log.warning("a GPU driver is present, but there is no torch that can use it; using the CPU")
        return "cpu"
    device = f"cuda:{int(index or 0)}"
    try:
        _run_kernel(device)
    except (ImportError, RuntimeError, AssertionError) as error:  # torch asserts if it has no CUDA
        reason = str(error).splitlines()[0]
        if wanted != "auto":
            raise DeviceUnavailable(f"device {wanted} cannot run a kernel: {reason}") from error
        log.warning("CUDA is present but cannot run a kernel (%s); using the CPU", reason)
        return "cpu"
    return device


def describe_device(device: str) -> str:
    """The device for people to read: ``cpu``, or a GPU with its name, ``cuda:0 (NVIDIA H200)``."""
    if not device.startswith("cuda"):
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def describe_machine(device: str) -> dict[str, str]:
    """Facts that decide which plan is fastest on ``device``: its processor's name and features."""
    facts = {"cpu": _cpu_fact("model name"), "flags": " ".join(sorted(cpu_flags()))}
    if device.startswith("cuda"):
        import torch

        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = f"{properties.name} {properties.major}.{properties.minor}"
        facts["cuda"] = str(torch.version.cuda)
    return facts


def cpu_flags() -> frozenset[str]:
    """The CPU's instruction sets as Linux names them; empty if Linux does not list them."""
    return frozenset((_cpu_fact("flags") or _cpu_fact("Features")).split())


@functools.cache
def _cpu_fact(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in found if key.strip() == name), "")


@contextmanager
def device_errors() -> Iterator[None]:
    """Translate torch's errors about a GPU into the two kinds that callers handle differently.

    Raises:
        DeviceOutOfMemory: a smaller batch, or the CPU, may still answer.
        DeviceLost: any other GPU error; after it, every GPU call of this process fails.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise DeviceOutOfMemory(str(error).partition(". ")[0]) from error
    except RuntimeError as error:  # AcceleratorError, or an error that begins with a library's name
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not isinstance(error, torch.AcceleratorError) and not text.startswith(_GPU_LIBRARIES):
            raise
        raise DeviceLost(text) from error


def _has_driver() -> bool:
    return any(Path("/dev", node).exists() for node in _DRIVER_NODES)


def _run_kernel(device: str) -> None:
    """Run a convolution and copy its result back. With some drivers torch loads but this fails."""
    import torch
    from torch.nn import functional

    ones = torch.ones(1, 1, 4, 4, device=device)
    kernel = torch.ones(1, 1, 3, 3, device=device)
    total = functional.conv2d(ones, kernel).sum().item()
    if total != 36:
        raise RuntimeError(f"a convolution of ones gave {total} instead of 36")
