"""``convoy import models:/NAME/3``: a version that MLflow's own ``log_model`` made."""

import re
import tempfile
from pathlib import Path
from typing import Any

from registry.core.errors import ConvoyError, UsageError
from registry.core.paths import convoy_paths
from registry.model.graphs.onnx_rules import MAX_GRAPH_BYTES
from training.importing.preprocess_file import make_spec
from training.importing.sources.base import Request, Source, SourceModel
from training.importing.sources.onnx_file import read_file

# MLflow takes names that Convoy does not.
_VERSION = re.compile(r"models:/([^/@]+)/([1-9]\d{0,8})")


class MlflowVersion(Source):
    """A version of the flavour onnx; of pytorch, if the user says that its code may run."""

    name = "mlflow"
    metavar = "models:/NAME/N"
    help = "a version in the MLflow registry"
    packages = ("mlflow", "onnx", "onnxscript")
    extra = "training"
    options = frozenset({"run_code"})

    def load(self, request: Request) -> SourceModel:
        """The version's graph, or that of the network that its code builds."""
        from registry.store.mlflow_store import ModelStore

        named = _VERSION.fullmatch(request.what)
        if named is None:
            raise UsageError(f"{request.what}: name the version by its number, models:/NAME/N")
        foreign = ModelStore(convoy_paths()).foreign
        version = foreign.describe(named[1], int(named[2]))
        is_torch = "pytorch" in version.flavours and "onnx" not in version.flavours
        if is_torch and not request.run_code:
            raise UsageError(
                f"{request.what} is of the flavour pytorch: loading it runs code that it holds. "
                "Add --run-code if you trust that code; or log the model in the flavour onnx"
            )
        if not is_torch and "onnx" not in version.flavours:
            what = ", ".join(version.flavours) or version.why
            raise UsageError(f"{request.what} is {what}; {version.advice}")
        with tempfile.TemporaryDirectory(prefix="convoy-mlflow-") as temporary:
            folder = foreign.fetch(version, Path(temporary))
            graph = _torch_graph(folder, request) if is_torch else _onnx_graph(folder)
        return SourceModel(
            # MLflow's model has no log that Convoy could trust, so it keeps its name for itself.
            name=f"{named[1]}_imported",
            graph=graph,
            origin=f"MLflow, {'pytorch' if is_torch else 'onnx'}: {request.what}",
            labels=request.labels or (),
            preprocess=request.preprocess,
        )


def _onnx_graph(folder: Path) -> bytes:
    """The graph with its weights; MLflow writes large ones beside it."""
    import onnx

    from registry.store.foreign_models import onnx_file

    file = onnx_file(folder)
    try:
        model = onnx.load_model_from_string(read_file(file, MAX_GRAPH_BYTES))
        # Before they are read: many weights may claim the same bytes of one file.
        claimed = sum(_beside(weight, file.parent) for weight in model.graph.initializer)
        if claimed > MAX_GRAPH_BYTES:
            raise UsageError(f"the weights have {claimed:,} bytes; at most {MAX_GRAPH_BYTES:,}")
        # The package refuses weights outside of the folder.
        onnx.load_external_data_for_model(model, str(file.parent))
        data: bytes = model.SerializeToString()
    except ConvoyError:
        raise
    except Exception as error:  # it raises errors of many types for damaged files
        raise UsageError(f"the graph cannot be read: {str(error)[:300]}") from error
    return data


def _beside(weight: Any, folder: Path) -> int:
    """How many bytes the package ``onnx`` will read for ``weight`` from a file in ``folder``."""
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    if not uses_external_data(weight):
        return 0
    info = ExternalDataInfo(weight)
    return int(info.length or (folder / info.location).stat().st_size)


def _torch_graph(folder: Path, request: Request) -> bytes:
    from training.importing.sources.torch_network import to_graph
    from training.publishing.tracking import run_torch_flavour

    spec = make_spec(request.preprocess)
    try:
        network = run_torch_flavour(folder)
    except Exception as error:  # the code may raise anything
        raise UsageError(f"{request.what} cannot be loaded: {error}") from error
    return to_graph(network, spec.shape)


SOURCE = MlflowVersion()
