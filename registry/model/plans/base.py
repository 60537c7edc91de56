"""The base class of plans, what a plan loads, and the catalogue of all plans.

To list the plans imports neither torch nor an engine: a plan imports its engine when it loads.
"""

import importlib
import importlib.util
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from registry.core import devices
from registry.core.errors import UsageError
from registry.model.bundle import Bundle
from registry.model.image.decode import Pixels
from registry.model.manifest import Precision

if TYPE_CHECKING:
    from registry.model.preprocessed_model import PreprocessedModel


class Outputs(NamedTuple):
    """The outputs of a forward pass for N images: logits (N, classes), features (N, D) or None."""

    logits: NDArray[np.float32]
    features: NDArray[np.float32] | None = None

    @classmethod
    def joined(cls, parts: Sequence["Outputs"]) -> "Outputs":
        """The outputs of consecutive batches, joined as those of one batch."""
        if len(parts) == 1:
            return parts[0]
        features = [part.features for part in parts if part.features is not None]
        return cls(
            np.concatenate([part.logits for part in parts]),
            np.concatenate(features) if len(features) == len(parts) else None,
        )

    def rows(self) -> NDArray[np.float32]:
        """Logits and features side by side, (N, classes + D): one row for each image."""
        if self.features is None:
            return self.logits
        return np.concatenate((self.logits, self.features), axis=1)

    @classmethod
    def from_rows(cls, rows: NDArray[np.float32], classes: int) -> "Outputs":
        """The outputs from an array that ``rows`` returned."""
        has_features = rows.shape[1] > classes
        return cls(rows[:, :classes], rows[:, classes:] if has_features else None)


PredictFn = Callable[[Pixels], Outputs]
"""A forward pass over uint8 (N, H, W, C), N ≥ 1. Not safe for calls from two threads at once."""


class PlanContext:
    """The bundle, device and threads for which a plan loads a network."""

    def __init__(self, bundle: Bundle, device: str = "cpu", threads: int | None = None) -> None:
        """``threads`` are those of one forward pass; None lets the engine choose."""
        self.bundle = bundle
        self.device = device
        self.threads = threads

    @cached_property
    def preprocessed(self) -> "PreprocessedModel":
        """The fp32 model with the bundle's weights, on the CPU, in evaluation mode. Built once."""
        from registry.model.preprocessed_model import load_preprocessed

        return load_preprocessed(self.bundle)


class Plan(ABC):
    """One way to run a network: ``load`` returns a ``PredictFn``.

    A plan has no state and writes no files.
    """

    name: ClassVar[str]
    precision: ClassVar[Precision]
    device: ClassVar[str] = "cpu"
    """The kind of device: ``cpu``, ``cuda`` or ``any``."""
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    """Distributions that the plan needs. A new version of one makes a new benchmark necessary."""
    exports: ClassVar[tuple[str, ...]] = ()
    """Files of the bundle that the plan reads instead of the weights."""
    cpu_flags: ClassVar[frozenset[str]] = frozenset()
    """The CPU needs one of these flags, or the engine has no kernels in this precision."""
    batch_sizes: ClassVar[tuple[int, ...]] = (1, 3)
    """Batch sizes at which the plan may compute differently. The golden images prove each."""

    def unsupported(self, device: str) -> str | None:
        """Why this machine cannot run the plan, or None. Imports nothing heavy."""
        if self.cpu_flags and not self.cpu_flags & devices.cpu_flags():
            return f"this CPU has no {self.precision} instructions"
        kind = device.partition(":")[0]
        if self.device not in ("any", kind):
            return f"runs on {self.device} only"
        missing = [name for name in self.packages if not importlib.util.find_spec(name)]
        return f"not installed: {', '.join(missing)}" if missing else None

    @abstractmethod
    def load(self, context: PlanContext) -> PredictFn:
        """The forward pass of ``context``'s network. It needs torch only if the engine is torch."""


def catalogue() -> dict[str, Plan]:
    """All plans by name, whether or not this machine can run them."""
    package = importlib.import_module("registry.model.plans")
    plans: dict[str, Plan] = {}
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"registry.model.plans.{found.name}")
        for plan in getattr(module, "PLANS", ()):
            plans[plan.name] = plan
    return plans


def find_plan(name: str) -> Plan:
    """The plan ``name``.

    Raises:
        UsageError: there is none.
    """
    plans = catalogue()
    if name not in plans:
        raise UsageError(f"there is no plan {name!r}; use one of: auto, {', '.join(plans)}")
    return plans[name]
