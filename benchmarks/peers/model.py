"""The model code of the textbook handler: eager fp32, decoding with Pillow, and a list of classes.

It is written as in tutorials. It reads the same bundle as Convoy, so that their answers can be
compared, and uses Convoy's code only for the bundle and the network's layers.
"""

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from registry.model.bundle import open_bundle
from registry.model.networks import build_network

torch.set_num_threads(1)

bundle = open_bundle(Path(os.environ["BENCH_BUNDLE"]))
manifest = bundle.manifest
spec = manifest.preprocess
network = build_network(
    manifest.network.name,
    (spec.channels, spec.height_px, spec.width_px),
    len(manifest.labels),
    **manifest.network.args,
)
network.load_state_dict({name: torch.tensor(array) for name, array in bundle.weights().items()})
network.eval()
mean = torch.tensor(spec.mean).view(-1, 1, 1)
std = torch.tensor(spec.std).view(-1, 1, 1)
RESAMPLE = Image.Resampling[spec.interpolation.upper()]


def preprocess(data: bytes) -> torch.Tensor:
    """The normalised picture, float32 (1, C, H, W)."""
    image = Image.open(io.BytesIO(data)).convert(spec.mode)
    if spec.resize_shorter_px:
        scale = spec.resize_shorter_px / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), RESAMPLE)
        left = (image.width - spec.width_px) // 2
        top = (image.height - spec.height_px) // 2
        image = image.crop((left, top, left + spec.width_px, top + spec.height_px))
    else:
        image = image.resize((spec.width_px, spec.height_px), RESAMPLE)
    array = np.asarray(image, dtype=np.float32).reshape(spec.height_px, spec.width_px, -1) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    return ((tensor - mean) / std).unsqueeze(0)


def predict(data: bytes) -> list[dict[str, object]]:
    """The five most probable classes."""
    with torch.no_grad():
        probabilities = network(preprocess(data)).softmax(dim=1)[0]
    values, indices = probabilities.topk(min(5, len(manifest.labels)))
    return [
        {"label": manifest.labels[index], "index": index, "probability": value}
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
    ]
