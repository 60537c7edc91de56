"""``convoy import --torchvision NAME``: labels and preprocessing from ``weights.transforms()``."""

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from registry.core.errors import UsageError
from training.importing.sources.base import Request, Source, SourceModel, distinct

# Built with torchvision's weights, they transform their input; their weights do not show it.
NORMALISES_ITSELF = ("inception_v3", "googlenet")


class Torchvision(Source):
    """One of torchvision's classifiers, with weights of its own or of the user."""

    name = "torchvision"
    metavar = "NAME[/WEIGHTS]"
    help = "one of torchvision's classifiers, such as resnet50 or resnet50/IMAGENET1K_V1"
    packages = ("torchvision", "onnxscript")
    extra = "training,torchvision"
    options = frozenset({"weights", "download"})

    def load(self, request: Request) -> SourceModel:
        """The classifier, by default with the newest of torchvision's weights."""
        from torchvision import models

        from training.importing.preprocess_file import make_spec, merge_members
        from training.importing.sources.torch_network import set_weights, to_graph

        name, _, wanted = request.what.partition("/")
        try:
            known = models.get_model_weights(name)
        except ValueError as error:
            raise UsageError(f"--torchvision {request.what}: {error}") from error
        if wanted and wanted not in known.__members__:
            raise UsageError(
                f"{name} has no weights {wanted}; it has {', '.join(known.__members__)}"
            )
        entry = known[wanted] if wanted else known.DEFAULT
        transforms = entry.transforms()
        if not hasattr(transforms, "crop_size"):
            raise UsageError(f"{name} is not a classifier of torchvision")
        labels = request.labels or distinct(entry.meta["categories"])
        preprocess = merge_members(preprocess_of(transforms), request.preprocess)
        spec = make_spec(preprocess)
        if request.weights is not None:
            if name in NORMALISES_ITSELF:
                raise UsageError(
                    f"{name} normalises pictures itself if it was built with torchvision's "
                    "weights; build it in a function of yours, and use --torch"
                )
            network = models.get_model(name, weights=None, num_classes=len(labels))
            set_weights(network, request.weights)
        else:
            _check_file(entry, may_download=request.download)
            network = models.get_model(name, weights=entry)
        return SourceModel(
            name=name,
            graph=to_graph(network, spec.shape),
            origin=f"torchvision: {name}, {request.weights or entry}",
            labels=labels,
            preprocess=preprocess,
        )


def preprocess_of(transforms: Any) -> dict[str, Any]:
    """The members of a preprocessing file for torchvision's ``ImageClassification`` transforms."""
    return {
        "size": transforms.crop_size[0],
        "resize_shorter_px": transforms.resize_size[0],
        "interpolation": transforms.interpolation.value,
        "mean": tuple(transforms.mean),
        "std": tuple(transforms.std),
        "longer_side": "down",
        "crop_offset": "even",
    }


def _check_file(entry: Any, *, may_download: bool) -> None:
    """Refuse weights that torch has not fetched yet, unless it may fetch them now."""
    import torch

    folder = Path(torch.hub.get_dir(), "checkpoints")  # noqa: TID251 - only the name of a folder
    file = folder / Path(urlsplit(entry.url).path).name
    if not file.is_file() and not may_download:
        raise UsageError(
            f"the weights {entry} are not on this machine ({file}); give a file with --weights, or "
            f"let torchvision fetch {entry.url} with --download"
        )


SOURCE = Torchvision()
