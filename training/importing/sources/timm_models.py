"""``convoy import --timm NAME``: labels and preprocessing from timm's ``pretrained_cfg``."""

import os
from typing import Any

from registry.core.errors import UsageError
from training.importing.preprocess_file import make_spec, merge_members
from training.importing.sources.base import Request, Source, SourceModel, distinct

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


class Timm(Source):
    """One of timm's classifiers, with weights of its own or of the user."""

    name = "timm"
    metavar = "NAME"
    help = "one of timm's classifiers, such as resnet50.a1_in1k or local-dir:FOLDER"
    packages = ("timm", "onnxscript")
    extra = "training,timm"
    options = frozenset({"weights", "download"})

    def load(self, request: Request) -> SourceModel:
        """The classifier, by default with the weights that timm keeps or fetches."""
        if not request.download:  # read when timm's hub is imported
            os.environ["HF_HUB_OFFLINE"] = "1"
        import timm

        from training.importing.sources.torch_network import set_weights, to_graph

        # With timm's own weights, another number of classes would make a random last layer.
        is_own = request.weights is not None and request.labels
        classes = {"num_classes": len(request.labels or ())} if is_own else {}
        try:
            network = timm.create_model(request.what, pretrained=request.weights is None, **classes)
        except Exception as error:  # timm's registry and its hub raise errors of many types
            text = str(error).strip().partition("\n")[0]
            raise UsageError(
                f"--timm {request.what}: {text[:300]} (weights that are not on this machine need "
                "--weights FILE or --download)"
            ) from error
        if request.weights is not None:
            set_weights(network, request.weights)
        preprocess = merge_members(
            preprocess_of(timm.data.resolve_data_config(model=network)), request.preprocess
        )
        return SourceModel(
            name=request.what.rpartition("/")[2].partition(".")[0],
            graph=to_graph(network, make_spec(preprocess).shape),
            origin=f"timm {timm.__version__}: {request.what}",
            labels=request.labels or labels_of(network),
            preprocess=preprocess,
        )


def preprocess_of(config: dict[str, Any]) -> dict[str, Any]:
    """The members of a preprocessing file for what ``timm.data.resolve_data_config`` returns.

    Raises:
        UsageError: the pictures are prepared in a way that Convoy does not have.
    """
    channels, height_px, width_px = config["input_size"]
    crop_pct, mode = config["crop_pct"], config.get("crop_mode", "center")
    interpolation = config["interpolation"]
    members: dict[str, Any] = {
        "size": (width_px, height_px),
        "mode": "L" if channels == 1 else "RGB",
        "interpolation": interpolation if interpolation in INTERPOLATIONS else "bilinear",
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "longer_side": "down",
        "crop_offset": "even",
    }
    if mode == "squash":
        members["resize_px"] = (int(width_px / crop_pct), int(height_px / crop_pct))
    elif mode == "center" and height_px == width_px:
        members["crop_pct"] = crop_pct
    else:
        raise UsageError(
            f"timm prepares its pictures by crop_mode {mode!r} for {width_px}×{height_px}; "
            "describe it with --preprocess"
        )
    return members


def labels_of(network: Any) -> tuple[str, ...]:
    """The labels in timm's records; empty if they say nothing of the network's classes."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if names := network.pretrained_cfg.get("label_names"):
        descriptions = network.pretrained_cfg.get("label_descriptions") or {}
        return distinct([descriptions.get(each, each) for each in names])
    subset = infer_imagenet_subset(network)
    if subset is None:
        return ()
    info = ImageNetInfo(subset)
    return distinct([info.index_to_description(each) for each in range(network.num_classes)])


SOURCE = Timm()
