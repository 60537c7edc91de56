"""What a plan is, what it loads, and the list of all of them.

Light: engines and torch are imported by the plans when they load, never by listing them.
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
    """What a forward pass gives for N images: logits (N, classes), and features (N, D) if any."""

    logits: NDArray[np.float32]
    features: NDArray[np.float32] | None = None

    @classmethod
    def joined(cls, parts: Sequence["Outputs"]) -> "Outputs":
        """The outputs of consecutive batches as those of one."""
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
        """What ``rows`` made one array of."""
        has_features = rows.shape[1] > classes
        return cls(rows[:, :classes], rows[:, classes:] if has_features else None)


PredictFn = Callable[[Pixels], Outputs]
"""A forward pass over uint8 (N, H, W, C), N ≥ 1. One call at a time."""


class Source:
    """What a plan loads. The program is made once, when it is first asked for."""

    def __init__(self, bundle: Bundle, device: str = "cpu", threads: int | None = None) -> None:
        """``threads`` for one forward pass; None leaves the engine's own choice."""
        self.bundle = bundle
        self.device = device
        self.threads = threads

    @cached_property
    def preprocessed(self) -> "PreprocessedModel":
        """The fp32 program with the bundle's weights, on the CPU, in evaluation mode."""
        from registry.model.preprocessed_model import load_preprocessed

        return load_preprocessed(self.bundle)


class Plan(ABC):
    """One way to run a network. It has no state and writes no files: ``load`` returns a
    ``PredictFn``."""

    name: ClassVar[str]
    precision: ClassVar[Precision]
    device: ClassVar[str] = "cpu"
    """The kind of device: ``cpu``, ``cuda`` or ``any``."""
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    """Distributions that it needs, and whose versions a verdict about it hangs on."""
    exports: ClassVar[tuple[str, ...]] = ()
    """Files of the bundle that it reads instead of the weights."""
    cpu_flags: ClassVar[frozenset[str]] = frozenset()
    """Flags of which the CPU needs one, or engines have no kernels in this precision."""
    batch_sizes: ClassVar[tuple[int, ...]] = (1, 3)
    """Of a batch, at which it may compute otherwise than at others: each is proved."""

    def unsupported(self, device: str) -> str | None:
        """Why this machine cannot run it, or None. Imports nothing heavy."""
        if self.cpu_flags and not self.cpu_flags & devices.cpu_flags():
            return f"this CPU has no {self.precision} instructions"
        kind = device.partition(":")[0]
        if self.device not in ("any", kind):
            return f"runs on {self.device} only"
        missing = [name for name in self.packages if not importlib.util.find_spec(name)]
        return f"not installed: {', '.join(missing)}" if missing else None

    @abstractmethod
    def load(self, source: Source) -> PredictFn:
        """Open the engine; the result needs no torch unless the engine is torch."""


def catalogue() -> dict[str, Plan]:
    """Every plan by name, whether or not this machine can run it."""
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
        raise UsageError(f"there is no plan {name!r}; there are: auto, {', '.join(plans)}")
    return plans[name]
