"""Where a network runs: the same rule for training, publishing and serving.

Torch is imported only where a GPU may be: a worker whose plan needs no torch loads none.
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
    """Those that this process may use, by its affinity and its container's quota (cgroup v2)."""
    mine = len(os.sched_getaffinity(0))
    try:
        allowed, period = quota.read_text().split()
        return min(mine, math.ceil(int(allowed) / int(period)))
    except (OSError, ValueError):  # no container, or one whose quota is "max"
        return mine


CORES = cores()

# What a GPU's driver makes: NVIDIA's, AMD's, and Windows' in WSL.
_DRIVER_NODES = ("nvidiactl", "kfd", "dxg")
_GPU_LIBRARIES = ("CUDA", "cuDNN", "cuBLAS")
# Flags, by Linux's names, of which a CPU needs one for an engine to have kernels in that precision.
# Whether those are faster than fp32 is timed, never assumed. The last of each is ARM's.
# On AVX2 alone there are none for bf16: OpenVINO computes fp32 instead, and torch falls back to
# loops with which ResNet-18 was 6 times slower than fp32 and took 161 s to time (0006).
BF16_FLAGS = frozenset({"avx512bw", "avx_ne_convert", "bf16"})
INT8_FLAGS = frozenset({"avx2", "asimddp"})


def serving_threads(environment: Mapping[str, str] = os.environ) -> int:
    """Threads of a forward pass in a service with these settings.

    Raises:
        UsageError: ``CONVOY_WORKERS`` is no number above 0.
    """
    text = environment.get("CONVOY_WORKERS") or str(CORES)
    if not text.isdecimal() or not int(text):
        raise UsageError(f"CONVOY_WORKERS={text!r}; it must be a whole number above 0")
    return forward_threads(int(text))


def forward_threads(workers: int) -> int:
    """Threads of one forward pass when ``workers`` share the cores; more collapse under load."""
    return max(1, CORES // workers)


def may_use_gpu(wanted: str) -> bool:
    """Whether ``choose_device`` may answer with a GPU; finding out for certain takes torch."""
    return wanted != "cpu" and (wanted != "auto" or _has_driver())


def choose_device(wanted: str = "auto") -> str:
    """The device to run on, ``cpu`` or ``cuda:N``, after a kernel has really run there.

    Args:
        wanted: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` (CUDA where it works, else the CPU with
            one warning if a GPU is present but cannot be used).

    Raises:
        DeviceUnavailable: a device asked for by name cannot run a kernel.
        UsageError: ``wanted`` is none of the above.
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
        log.warning("a GPU's driver is here, but no torch that can use it; using the CPU")
        return "cpu"
    device = f"cuda:{int(index or 0)}"
    try:
        _run_kernel(device)
    except (ImportError, RuntimeError, AssertionError) as error:  # it asserts when it has no CUDA
        reason = str(error).splitlines()[0]
        if wanted != "auto":
            raise DeviceUnavailable(f"device {wanted} cannot run a kernel: {reason}") from error
        log.warning("CUDA is present but cannot run a kernel (%s); using the CPU", reason)
        return "cpu"
    return device


def describe_device(device: str) -> str:
    """``cpu``, or the GPU with its name: ``cuda:0 (NVIDIA H200)``."""
    if not device.startswith("cuda"):
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def describe_machine(device: str) -> dict[str, str]:
    """What decides which plan is fastest on ``device``: the processor's name and abilities."""
    facts = {"cpu": _cpu_fact("model name"), "flags": " ".join(sorted(cpu_flags()))}
    if device.startswith("cuda"):
        import torch

        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = f"{properties.name} {properties.major}.{properties.minor}"
        facts["cuda"] = str(torch.version.cuda)
    return facts


def cpu_flags() -> frozenset[str]:
    """The CPU's instruction sets as Linux names them; empty where it does not say."""
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
    """Whatever torch raises about a GPU, as the one of our errors that says what can be done.

    Raises:
        DeviceOutOfMemory: a smaller batch, or the CPU, may still answer.
        DeviceLost: anything else; after such an error every call of this process fails.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise DeviceOutOfMemory(str(error).partition(". ")[0]) from error
    except RuntimeError as error:  # torch.AcceleratorError, or a library's with its name in front
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not isinstance(error, torch.AcceleratorError) and not text.startswith(_GPU_LIBRARIES):
            raise
        raise DeviceLost(text) from error


def _has_driver() -> bool:
    return any(Path("/dev", node).exists() for node in _DRIVER_NODES)


def _run_kernel(device: str) -> None:
    """A convolution and a copy back: drivers exist that import well and fail here."""
    import torch
    from torch.nn import functional

    ones = torch.ones(1, 1, 4, 4, device=device)
    kernel = torch.ones(1, 1, 3, 3, device=device)
    total = functional.conv2d(ones, kernel).sum().item()
    if total != 36:
        raise RuntimeError(f"a convolution of ones gave {total} instead of 36")
