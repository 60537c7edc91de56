"""``convoy import --huggingface FOLDER``: a classifier that transformers saved."""

import json
import os
from pathlib import Path
from typing import Any

from registry.core.errors import UsageError
from training.importing.preprocess_file import make_spec, merge_members
from training.importing.sources.base import Request, Source, SourceModel, distinct
from training.importing.sources.onnx_file import read_file

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
FETCHED = ("*.json", "*.safetensors")
MAX_CONFIG_BYTES = 16 * 1024 * 1024
# Pillow's numbers for interpolations.
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
# Members that say nothing of the pixels of a picture in RGB.
IGNORED = {
    "image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb",
    "data_format", "input_data_format", "return_tensors", "disable_grouping", "device",
    "image_seq_length", "_valid_processor_keys", "resample", "size", "crop_size", "do_resize",
    "do_center_crop", "do_rescale", "rescale_factor", "rescale_offset", "do_normalize",
    "image_mean", "image_std", "crop_pct", "default_to_square",
}  # fmt: skip
# Processors that resize by a rule of their own, which their file does not say.
OWN_RULES = ("Levit", "Perceiver", "PoolFormer")
# ConvNeXT's processor crops pictures that are smaller than this, and stretches others.
CONVNEXT, CONVNEXT_CROPPED_PX = "ConvNext", 384


class HuggingFace(Source):
    """A folder with ``config.json`` and weights; ``preprocessor_config.json`` if there is one."""

    name = "huggingface"
    metavar = "FOLDER"
    help = "a folder that transformers wrote; with --download also a name on the hub"
    packages = ("transformers", "onnxscript")
    extra = "training,huggingface"
    options = frozenset({"download"})

    def load(self, request: Request) -> SourceModel:
        """The classifier in the folder, without any code that came with it."""
        folder = _folder(request)
        config = _json(folder / CONFIG)
        preprocessor = folder / PREPROCESSOR
        try:
            record = preprocess_of(_json(preprocessor)) if preprocessor.is_file() else {}
            labels = request.labels or labels_of(config)
        except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
            raise UsageError(
                f"{CONFIG} or {PREPROCESSOR} is not as transformers writes it: {error}; use "
                "--labels and --preprocess"
            ) from error
        preprocess = merge_members(record, request.preprocess)
        spec = make_spec(preprocess)
        return SourceModel(
            name=Path(request.what).name,
            graph=_graph(folder, spec.shape),
            origin=f"Hugging Face: {request.what}",
            labels=labels,
            preprocess=preprocess,
        )


def preprocess_of(record: dict[str, Any]) -> dict[str, Any]:
    """The members of a preprocessing file for the content of ``preprocessor_config.json``.

    Raises:
        UsageError: the pictures are prepared in a way that Convoy does not have.
    """
    kind = str(record.get("image_processor_type") or record.get("feature_extractor_type") or "")
    if record.get("resample", 2) not in RESAMPLE:
        raise UsageError(f"{PREPROCESSOR} resamples by {record['resample']!r}, which is not known")
    unknown = [name for name, value in record.items() if name not in IGNORED and value]
    if kind.startswith(OWN_RULES):
        unknown.append(kind)
    if unknown:
        raise UsageError(
            f"{PREPROCESSOR} prepares pictures by {', '.join(unknown)}, which Convoy does not "
            "know; describe it with --preprocess"
        )
    # What the network gets is (pixel × factor − offset − mean) / std.
    factor = record.get("rescale_factor", 1 / 255) if record.get("do_rescale", True) else 1.0
    offset = 1.0 if record.get("rescale_offset") else 0.0
    normalises = record.get("do_normalize", True)
    mean = record.get("image_mean") if normalises else None
    std = record.get("image_std") if normalises else None
    interpolation = RESAMPLE[record.get("resample", 2)]
    return {
        **_sizes(record, kind),
        "interpolation": interpolation,
        "mean": tuple((each + offset) / (255 * factor) for each in mean or (0.0,) * 3),
        "std": tuple(each / (255 * factor) for each in std or (1.0,) * 3),
        # As transformers 5 does it. Its processors that use Pillow write the same record.
        "resampler": "pillow" if interpolation == "lanczos" else "torch",
        "longer_side": "down",
        "crop_offset": "down",
    }


def labels_of(config: dict[str, Any]) -> tuple[str, ...]:
    """The labels in ``config.json``, in the order of the scores."""
    found = config.get("id2label") or {}
    return distinct([str(found[each]) for each in sorted(found, key=int)])


def _sizes(record: dict[str, Any], kind: str) -> dict[str, Any]:
    """The members that say how a picture gets its size."""
    size = record.get("size") or {}
    crop = record.get("crop_size") or {}
    crops = bool(record.get("do_center_crop"))
    if isinstance(size, int):  # older files: of the shorter side, if the rest is cut off
        is_shorter = crops or record.get("crop_pct") is not None
        size = {"shortest_edge": size} if is_shorter else {"height": size, "width": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    shorter = size.get("shortest_edge")
    if kind.startswith(CONVNEXT) and shorter:
        if shorter >= CONVNEXT_CROPPED_PX:
            return {"size": shorter}
        crop_pct = record.get("crop_pct") or 224 / 256
        return {"size": shorter, "resize_shorter_px": int(shorter / crop_pct)}
    try:
        if not record.get("do_resize", True):
            raise KeyError("do_resize")
        if crops:
            made: dict[str, Any] = {"size": (crop["width"], crop["height"])}
            if shorter:
                return {**made, "resize_shorter_px": shorter}
            return {**made, "resize_px": (size["width"], size["height"])}
        return {"size": (size["width"], size["height"])}
    except KeyError as error:
        raise UsageError(
            f"{PREPROCESSOR} says no {error} of the pictures ({size}, {crop}); describe it with "
            "--preprocess"
        ) from error


def _folder(request: Request) -> Path:
    folder = Path(request.what)
    if (folder / CONFIG).is_file():
        return folder
    if folder.exists() or not request.download:
        raise UsageError(
            f"{folder} is not a folder with {CONFIG}; a name on the hub needs --download"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(request.what, allow_patterns=list(FETCHED)))
    except Exception as error:  # its errors have many types
        text = str(error).strip().partition("\n")[0]
        raise UsageError(f"{request.what} cannot be fetched: {text[:300]}") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_file(file, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{file} is not a JSON object")
    return found


def _graph(folder: Path, shape: tuple[int, int, int]) -> bytes:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; all files are here
    import torch
    import transformers

    from training.importing.sources.torch_network import to_graph

    class Logits(torch.nn.Module):
        """Returns the scores alone; transformers returns them in a record."""

        def __init__(self, network: Any) -> None:
            super().__init__()
            self.network = network

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.network(pixel_values=pictures).logits
            return logits

    try:
        network = transformers.AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # its errors have many types
        text = str(error).strip().partition("\n")[0]
        raise UsageError(f"transformers cannot load {folder}: {text[:300]}") from error
    return to_graph(Logits(network), shape)


SOURCE = HuggingFace()
