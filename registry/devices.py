"""Where a network runs: the same rule for training, publishing and serving."""

import logging

import torch
from torch.nn import functional

from registry.errors import DeviceUnavailable, UsageError

log = logging.getLogger(__name__)


def choose_device(wanted: str = "auto") -> torch.device:
    """The device to run on, after a kernel has really run there.

    Args:
        wanted: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` (CUDA where it works, else the CPU with
            one warning if a GPU is present but cannot be used).

    Raises:
        DeviceUnavailable: a device asked for by name cannot run a kernel.
        UsageError: ``wanted`` is none of the above.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    kind, _, index = wanted.partition(":")
    if wanted != "auto" and (kind != "cuda" or (index and not index.isdigit())):
        raise UsageError(f"device {wanted!r} is not known; use auto, cpu, cuda or cuda:N")
    device = torch.device("cuda" if wanted == "auto" else wanted)
    if wanted == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        _run_kernel(device)
    except (RuntimeError, AssertionError) as error:  # torch asserts when built without CUDA
        reason = str(error).splitlines()[0]
        if wanted != "auto":
            raise DeviceUnavailable(f"device {wanted} cannot run a kernel: {reason}") from error
        log.warning("CUDA is present but cannot run a kernel (%s); using the CPU", reason)
        return torch.device("cpu")
    return device


def describe_device(device: torch.device) -> str:
    """``cpu``, or the GPU with its name: ``cuda:0 (NVIDIA H200)``."""
    if device.type != "cuda":
        return device.type
    index = device.index or 0
    return f"cuda:{index} ({torch.cuda.get_device_name(index)})"


def _run_kernel(device: torch.device) -> None:
    """A convolution and a copy back: drivers exist that import well and fail here."""
    ones = torch.ones(1, 1, 4, 4, device=device)
    kernel = torch.ones(1, 1, 3, 3, device=device)
    total = functional.conv2d(ones, kernel).sum().item()
    if total != 36:
        raise RuntimeError(f"a convolution of ones gave {total} instead of 36")
