"""Each library's own preprocessing and network beside Convoy's, on 50 pictures.

A library that is not installed here is skipped, loudly. docs/decisions/0025 says how they were run.
"""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from registry.model.classifier import softmax
from registry.model.image.decode import decode_image
from registry.model.image.limits import TRUSTED_LIMITS
from training.importing.graph import describe, read_graph
from training.importing.owner import OwnerGraph
from training.importing.preprocess_file import make_spec
from training.importing.sources import huggingface_models, timm_models, torchvision_models
from training.importing.sources.base import Request, SourceModel, all_sources

PICTURES = 50
LABELS = tuple(f"class {number}" for number in range(10))
Transform = Callable[[Image.Image], Any]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """JPEGs of random, smooth colours, of sizes that divide nothing."""
    random = np.random.default_rng(5)
    made = []
    for number in range(PICTURES):
        rough = Image.fromarray(random.integers(0, 256, (13, 17, 3), np.uint8))
        size = 301 + 7 * number, 517 - 5 * number
        buffer = BytesIO()
        rough.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        made.append(buffer.getvalue())
    return made


def opened(file: bytes) -> Image.Image:
    return Image.open(BytesIO(file)).convert("RGB")


def largest_difference(files: list[bytes], members: dict[str, Any], theirs: Transform) -> float:
    """The largest difference from the library's pixels, in levels of 0 to 255."""
    spec = make_spec(members)
    mean, std = np.array(spec.mean), np.array(spec.std)
    largest = 0.0
    for file in files:
        ours = decode_image(file, spec, TRUSTED_LIMITS)
        normalised = np.asarray(theirs(opened(file))).transpose(1, 2, 0)
        largest = max(largest, float(np.abs((normalised * std + mean) * 255 - ours).max()))
    return largest


def answers(found: SourceModel, files: list[bytes]) -> Any:
    """The probabilities that an import proves itself with: of the graph, fed by our decoder."""
    facts = describe(read_graph(found.graph))
    spec = make_spec(found.preprocess, facts.height_px, facts.width_px, facts.channels)
    decoded = [decode_image(file, spec, TRUSTED_LIMITS) for file in files]
    return OwnerGraph(found.graph, facts, facts.scores).probabilities(decoded, spec)


def spread(network: torch.nn.Module, transform: Transform, files: list[bytes]) -> None:
    """Scale the last layer of random weights, so that answers differ from picture to picture."""
    pictures = torch.stack([torch.as_tensor(transform(opened(file))) for file in files])
    with torch.inference_mode():
        last = [each for each in network.modules() if isinstance(each, torch.nn.Linear)][-1]
        scores = network.eval()(pictures)
        scores = getattr(scores, "logits", scores)
        scale = 3 / scores.std(0).mean()
        last.weight *= scale
        last.bias.copy_(scale * (last.bias - scores.mean(0)))


@pytest.mark.parametrize(
    "name", ["resnet50", "efficientnet_b3", "vit_b_16", "inception_v3", "swin_t", "regnet_y_16gf"]
)
def test_pixels_are_torchvisions(name: str, files: list[bytes]) -> None:
    models = pytest.importorskip("torchvision").models
    for entry in models.get_model_weights(name):
        transforms = entry.transforms()
        members = torchvision_models.preprocess_of(transforms)
        difference = largest_difference(files, members, transforms)
        print(f"{entry}: {difference:.2g} levels")
        assert difference < 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "resnet50.a1_in1k", "vit_base_patch16_224.augreg_in21k_ft_in1k", "convnext_tiny.fb_in1k",
        "inception_v3.tf_in1k", "mobilenetv4_conv_small.e2400_r224_in1k", "dla34.in1k",
        "eva02_base_patch14_448.mim_in22k_ft_in1k", "efficientnet_lite0.ra_in1k",
    ],
)  # fmt: skip
def test_pixels_are_timms(name: str, files: list[bytes]) -> None:
    timm = pytest.importorskip("timm")
    pretrained = timm.get_pretrained_cfg(name).to_dict()
    config = timm.data.resolve_data_config(pretrained_cfg=pretrained)
    transform = timm.data.create_transform(**config, is_training=False)
    difference = largest_difference(files, timm_models.preprocess_of(config), transform)
    print(f"{name}: {difference:.2g} levels")
    assert difference < 1e-3


PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("ViTImageProcessor", {}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}, "crop_pct": 0.875}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    (
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True},
    ),
    (
        "MobileNetV2ImageProcessor",
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
    ),
    ("DeiTImageProcessor", {"size": {"height": 256, "width": 256}, "crop_size": 224}),
]


@pytest.mark.parametrize("backend", ["Pil", ""])
@pytest.mark.parametrize(("kind", "arguments"), PROCESSORS)
def test_pixels_are_those_of_transformers(
    kind: str, arguments: dict[str, Any], backend: str, files: list[bytes]
) -> None:
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, f"{kind}{backend}")(**arguments)
    members = huggingface_models.preprocess_of(processor.to_dict())
    if backend:
        members["resampler"] = "pillow"

    def theirs(picture: Image.Image) -> Any:
        return np.asarray(processor(picture, return_tensors="pt")["pixel_values"][0])

    difference = largest_difference(files, members, theirs)
    print(f"{kind}{backend} {arguments}: {difference:.2g} levels")
    assert difference < 1e-3


def check_whole(
    found: SourceModel, network: torch.nn.Module, transform: Transform, files: list[bytes]
) -> None:
    """The owner's own script beside the import: 50 of 50 answers, to 1e-3."""
    pictures = torch.stack([transform(opened(file)) for file in files])
    with torch.inference_mode():
        outputs = [network.eval()(each[None]) for each in pictures]
    scores = np.concatenate([getattr(each, "logits", each).numpy() for each in outputs])
    wanted, ours = softmax(scores), answers(found, files)
    difference = float(np.abs(wanted - ours).max())
    same = int((wanted.argmax(1) == ours.argmax(1)).sum())
    print(f"{found.origin}: {same} of {len(files)} best classes, {difference:.2g} at most")
    assert len(set(wanted.argmax(1).tolist())) > 1
    assert same == len(files)
    assert difference < 1e-3


def test_a_classifier_of_torchvision_answers_as_at_home(tmp_path: Path, files: list[bytes]) -> None:
    models = pytest.importorskip("torchvision").models
    transform = models.ResNet18_Weights.DEFAULT.transforms()
    network = models.resnet18(num_classes=len(LABELS))
    spread(network, transform, files)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    request = Request(what="resnet18", weights=tmp_path / "w.safetensors", labels=LABELS)
    found = all_sources()["torchvision"].open(request)
    check_whole(found, network, transform, files)


def test_a_classifier_of_timm_answers_as_at_home(tmp_path: Path, files: list[bytes]) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("mobilenetv3_small_100", num_classes=len(LABELS))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=network))
    spread(network, transform, files)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    request = Request(
        what="mobilenetv3_small_100", weights=tmp_path / "w.safetensors", labels=LABELS
    )
    found = all_sources()["timm"].open(request)
    check_whole(found, network, transform, files)


def test_a_folder_of_transformers_answers_as_at_home(tmp_path: Path, files: list[bytes]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1],
        layer_type="basic", num_labels=len(LABELS), id2label=dict(enumerate(LABELS)),
    )  # fmt: skip
    network: torch.nn.Module = transformers.ResNetForImageClassification(config)
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 224})

    def transform(picture: Image.Image) -> Any:
        return processor(picture, return_tensors="pt")["pixel_values"][0]

    spread(network, transform, files)
    network.save_pretrained(tmp_path)  # type: ignore[operator]
    processor.save_pretrained(tmp_path)
    found = all_sources()["huggingface"].open(Request(what=str(tmp_path)))
    assert found.labels == LABELS
    check_whole(found, network, transform, files)


def test_a_file_of_keras_answers_as_at_home(
    tmp_path: Path, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(3)
    layers = keras.layers
    network = keras.Sequential(
        [
            keras.Input((96, 96, 3)), layers.Conv2D(16, 3, strides=2, activation="relu"),
            layers.BatchNormalization(), layers.SeparableConv2D(32, 3, activation="relu"),
            layers.GlobalAveragePooling2D(), layers.Dense(len(LABELS)),
        ]
    )  # fmt: skip

    def transform(picture: Image.Image) -> Any:
        resized = picture.resize((96, 96), Image.Resampling.BILINEAR)
        return torch.tensor(np.asarray(resized, np.float32) / 127.5 - 1).permute(2, 0, 1)

    pictures = np.stack([transform(opened(file)).permute(1, 2, 0).numpy() for file in files])
    scores = network.predict(pictures, verbose=0)
    kernel, bias = network.layers[-1].get_weights()
    scale = 3 / scores.std(0).mean()
    network.layers[-1].set_weights([kernel * scale, scale * (bias - scores.mean(0))])
    network.save(tmp_path / "animals.keras")
    found = all_sources()["keras"].open(
        Request(
            what=str(tmp_path / "animals.keras"), labels=LABELS,
            preprocess={"size": 96, "mean": 0.5, "std": 0.5},
        )
    )  # fmt: skip
    wanted = softmax(network.predict(pictures, verbose=0))
    difference = float(np.abs(wanted - answers(found, files)).max())
    print(f"{found.origin}: {difference:.2g} at most")
    assert len(set(wanted.argmax(1).tolist())) > 1
    assert difference < 1e-3
