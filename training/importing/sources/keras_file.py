"""``convoy import --keras FILE.keras``: a model that Keras 3 saved, run by Keras on torch."""

import os
from pathlib import Path
from typing import Any

from registry.core.errors import UsageError
from training.importing.preprocess_file import make_spec
from training.importing.sources.base import Request, Source, SourceModel


class KerasFile(Source):
    """A file in Keras's own format. It says neither its labels nor its preprocessing."""

    name = "keras"
    metavar = "FILE"
    help = "a file FILE.keras; a model with Lambda layers is refused, because they hold code"
    packages = ("keras", "onnxscript")
    extra = "training,keras"

    def load(self, request: Request) -> SourceModel:
        """The model in the file, with the weights that are in it."""
        from training.importing.sources.torch_network import to_graph

        file = Path(request.what)
        spec = make_spec(request.preprocess)
        return SourceModel(
            name=file.stem,
            graph=to_graph(_network(file), spec.shape),
            origin=f"Keras: {file.name}",
            labels=request.labels or (),
            preprocess=request.preprocess,
        )


def _network(file: Path) -> Any:
    os.environ["KERAS_BACKEND"] = "torch"  # read when Keras is imported
    import keras
    import torch

    class ChannelsFirst(torch.nn.Module):
        """Takes pictures as all networks of torch here do; Keras wants the channels last."""

        def __init__(self, network: Any) -> None:
            super().__init__()
            self.network = network

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = self.network(pictures.permute(0, 2, 3, 1), training=False)
            return scores

    try:
        network = keras.saving.load_model(file, compile=False, safe_mode=True)
    except Exception as error:  # its errors have many types
        text = str(error).strip().partition("\n")[0]
        raise UsageError(f"Keras cannot load {file}: {text[:300]}") from error
    return ChannelsFirst(network)


SOURCE = KerasFile()
