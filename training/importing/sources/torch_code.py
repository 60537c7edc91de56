"""``convoy import --torch MODULE:BUILD``: a network that the user's own code builds."""

import importlib
import sys
from pathlib import Path
from typing import Any

from registry.core.errors import UsageError
from training.importing.preprocess_file import make_spec
from training.importing.sources.base import Request, Source, SourceModel


class TorchCode(Source):
    """A function of the user that returns a network, and a file with its weights."""

    name = "torch"
    metavar = "MODULE:BUILD"
    help = "a function that returns a network of torch: it runs here, and never when serving"
    packages = ("torch", "onnxscript")
    extra = "training"
    options = frozenset({"weights"})

    def load(self, request: Request) -> SourceModel:
        """The graph of the network that the function returns, with the weights of the file."""
        # Torch takes seconds to import, which an error above should not wait for.
        from torch import nn

        from training.importing.sources.torch_network import set_weights, to_graph

        spec = make_spec(request.preprocess)
        network = _build(request.what)
        if not isinstance(network, nn.Module):
            kind = type(network).__name__
            raise UsageError(f"--torch {request.what} gives {kind}, not a torch.nn.Module")
        if request.weights is not None:
            set_weights(network, request.weights)
        return SourceModel(
            name=request.what.partition(":")[0].rpartition(".")[2],
            graph=to_graph(network, spec.shape),
            origin=f"torch: {request.what}",
            labels=request.labels or (),
            preprocess=request.preprocess,
        )


def _build(what: str) -> Any:
    module_name, _, attribute = what.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"--torch {what}: write MODULE:BUILD, such as my_module:build")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        made = getattr(importlib.import_module(module_name), attribute)
        return made() if callable(made) and not hasattr(made, "state_dict") else made
    except Exception as error:
        raise UsageError(f"--torch {what} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)


SOURCE = TorchCode()
