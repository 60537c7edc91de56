"""What a source of models is, and the list of all sources. Imports no library of a source."""

import importlib
import importlib.util
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from msgspec import Struct

from registry.core.errors import UsageError


class Request(Struct, frozen=True, kw_only=True):
    """What the user asked for.

    Attributes:
        what: the value of the source's option, such as a name or a path.
        weights: a file with the weights, or None.
        labels: the labels that the user gave, or None.
        preprocess: the members of the user's preprocessing file; empty without one.
        download: whether the source may fetch what this machine lacks.
        run_code: whether the source may run code that came with the model.
    """

    what: str
    weights: Path | None = None
    labels: tuple[str, ...] | None = None
    preprocess: dict[str, Any] = {}
    download: bool = False
    run_code: bool = False


class SourceModel(Struct, frozen=True, kw_only=True):
    """A model as its source gave it.

    Attributes:
        name: for the registry, if the user gives none; characters that names lack are replaced.
        graph: the bytes of an ONNX graph from normalised pictures to scores.
        origin: where it comes from, for people.
        labels: of its classes, in their order; empty if neither the source nor the user knows them.
        preprocess: the members of a preprocessing file; empty if neither knows them.
    """

    name: str
    graph: bytes
    origin: str
    labels: tuple[str, ...] = ()
    preprocess: dict[str, Any] = {}


class Source(ABC):
    """One place or library from which models are imported. It has no state."""

    name: ClassVar[str]
    """The option is ``--NAME``."""
    metavar: ClassVar[str]
    help: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    """Modules that must be installed."""
    extra: ClassVar[str] = ""
    """The extra of Convoy that installs them."""
    options: ClassVar[frozenset[str]] = frozenset()
    """Which of ``weights``, ``download`` and ``run_code`` have a meaning for the source."""

    def open(self, request: Request) -> SourceModel:
        """The model, with the user's labels and preprocessing in place of the source's.

        Raises:
            UsageError: the source does not have the model, or a package or an option is missing.
        """
        for option in ("weights", "download", "run_code"):
            if getattr(request, option) and option not in self.options:
                text = option.replace("_", "-")
                raise UsageError(f"--{text} has no meaning for {request.what} ({self.name})")
        missing = [each for each in self.packages if not importlib.util.find_spec(each)]
        if missing:
            raise UsageError(
                f"--{self.name} needs {', '.join(missing)}; install convoy[{self.extra}]"
            )
        return self.load(request)

    @abstractmethod
    def load(self, request: Request) -> SourceModel:
        """As ``open``, once the packages are there."""


def distinct(labels: Sequence[str]) -> tuple[str, ...]:
    """``labels``, of which the second of two equal ones gets its index: ImageNet has two cranes."""
    seen: set[str] = set()
    found = []
    for index, label in enumerate(labels):
        found.append(f"{label} ({index})" if label in seen else label)
        seen.add(label)
    return tuple(found)


def all_sources() -> dict[str, Source]:
    """All sources by name, whether or not their libraries are installed."""
    package = importlib.import_module("training.importing.sources")
    modules = [
        importlib.import_module(f"{package.__name__}.{found.name}")
        for found in pkgutil.iter_modules(package.__path__)
    ]
    sources = [module.SOURCE for module in modules if hasattr(module, "SOURCE")]
    return {each.name: each for each in sources}
