"""The sources of ``convoy import``: what each reads, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch

import training.importing.sources
from convoy.__main__ import main
from registry.core.errors import UsageError
from training.importing.preprocess_file import make_spec, merge_members
from training.importing.sources.base import Request, all_sources, distinct
from training.importing.sources.huggingface_models import labels_of
from training.importing.sources.huggingface_models import preprocess_of as of_huggingface
from training.importing.sources.timm_models import preprocess_of as of_timm
from training.importing.sources.torch_network import read_weights
from training.importing.sources.torchvision_models import preprocess_of as of_torchvision

SIDE = 8
MODULE = """
import torch

def build():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(4, 3),
    )

def tuple_of_scores():
    class Tuple(torch.nn.Module):
        def forward(self, pictures):
            return (pictures.mean((2, 3)),)
    return Tuple()

def grey():
    return torch.nn.Conv2d(1, 2, 3)

def broken():
    raise RuntimeError("no disk")

number = 3
"""
MEMBERS = {"size": SIDE, "mean": 0.5, "std": 0.25}


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The network that ``foreign_net:build`` returns, with weights in ``weights.safetensors``."""
    (tmp_path / "foreign_net.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "foreign_net", raising=False)
    namespace: dict[str, Any] = {}
    exec(MODULE, namespace)
    made: torch.nn.Module = namespace["build"]()
    safetensors.torch.save_file(made.state_dict(), tmp_path / "weights.safetensors")
    return made


def test_a_network_of_torch_becomes_a_graph_with_its_weights(network: torch.nn.Module) -> None:
    request = Request(
        what="foreign_net:build", weights=Path("weights.safetensors"), preprocess=MEMBERS
    )
    found = all_sources()["torch"].open(request)
    assert (found.name, found.labels) == ("foreign_net", ())
    pictures = torch.rand(5, 3, SIDE, SIDE)
    with torch.inference_mode():
        wanted = network.eval()(pictures).numpy()
    session = onnxruntime.InferenceSession(found.graph, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"pictures": pictures.numpy()})
    np.testing.assert_allclose(scores, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("foreign_net", "write MODULE:BUILD"),
        ("absent_net:build", "ModuleNotFoundError"),
        ("foreign_net:absent", "AttributeError"),
        ("foreign_net:broken", "RuntimeError: no disk"),
        ("foreign_net:number", "gives int, not a torch.nn.Module"),
        ("foreign_net:tuple_of_scores", "returns tuple; it must return a tensor"),
        ("foreign_net:grey", "does not take float32"),
    ],
)
@pytest.mark.usefixtures("network")
def test_code_that_gives_no_classifier_is_refused(what: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        all_sources()["torch"].open(Request(what=what, preprocess=MEMBERS))


class _Runs:
    """Its unpickling would create a file."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path("ran"),)


def test_weights_are_read_without_running_what_is_in_the_file(network: torch.nn.Module) -> None:
    weights = network.state_dict()
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": each for name, each in weights.items()}}
    torch.save(wrapped, "checkpoint.pt")
    assert set(read_weights(Path("checkpoint.pt"))) == set(weights)

    torch.save({"state_dict": weights, "more": _Runs()}, "hostile.pt")
    with pytest.raises(UsageError, match=r"hostile\.pt holds more than weights"):
        read_weights(Path("hostile.pt"))
    assert not Path("ran").exists()
    torch.save([1, 2], "list.pt")
    Path("cut.safetensors").write_bytes(Path("weights.safetensors").read_bytes()[:100])
    for file in ("list.pt", "cut.safetensors", "absent.pt"):
        with pytest.raises(UsageError, match=file):
            read_weights(Path(file))
    safetensors.torch.save_file({"0.weight": torch.zeros(1)}, "other.safetensors")
    request = Request(
        what="foreign_net:build", weights=Path("other.safetensors"), preprocess=MEMBERS
    )
    with pytest.raises(UsageError, match=r"does not fit the network: Missing key.*3\.weight"):
        all_sources()["torch"].open(request)


def test_torchvisions_transforms_become_members() -> None:
    transforms = SimpleNamespace(
        crop_size=[224], resize_size=[232], interpolation=SimpleNamespace(value="bicubic"),
        mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6],
    )  # fmt: skip
    spec = make_spec(of_torchvision(transforms))
    assert (spec.resize_shorter_px, spec.shape, spec.interpolation) == (
        232, (224, 224, 3), "bicubic",
    )  # fmt: skip
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (spec.shrink_on_load, spec.crop_early) == (False, False)


def test_timms_records_become_members() -> None:
    config = {
        "input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.95,
        "crop_mode": "center", "mean": (0.5,) * 3, "std": (0.5,) * 3,
    }  # fmt: skip
    assert make_spec(of_timm(config)).resize_shorter_px == 235
    squash = make_spec(of_timm({**config, "crop_mode": "squash", "crop_pct": 1.0}))
    assert (squash.resize_px, squash.resize_shorter_px) == ((224, 224), None)
    assert make_spec(of_timm({**config, "input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,)}))
    for change in ({"crop_mode": "border"}, {"input_size": (3, 224, 192)}):
        with pytest.raises(UsageError, match="describe it with --preprocess"):
            of_timm({**config, **change})


def test_records_of_hugging_face_become_members() -> None:
    plain = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224},
        "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_resize": True,
    }  # fmt: skip
    spec = make_spec(of_huggingface(plain))
    assert (spec.shape, spec.resize_shorter_px, spec.mean, spec.std) == (
        (224, 224, 3), None, (0.5,) * 3, (0.25,) * 3,
    )  # fmt: skip
    convnext = {**plain, "image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875}
    assert make_spec(of_huggingface({**convnext, "size": 224})).resize_shorter_px == 256
    assert make_spec(of_huggingface({**convnext, "size": {"shortest_edge": 384}})).shape[0] == 384
    crops = {"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True}
    assert make_spec(of_huggingface({**plain, **crops})).resize_shorter_px == 256
    # From −1 to 1, by a scale and an offset.
    shifted = {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False}
    spec = make_spec(of_huggingface({**plain, **shifted}))
    assert spec.mean == pytest.approx((0.5,) * 3)
    assert spec.std == pytest.approx((0.5,) * 3)
    assert labels_of({"id2label": {"1": "dog", "0": "cat", "10": "cat"}}) == (
        "cat", "dog", "cat (2)",
    )  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"do_pad": True},
        {"include_top": True},
        {"image_processor_type": "LevitImageProcessor"},
        {"size": {"longest_edge": 224}},
        {"do_center_crop": True},
    ],
)
def test_a_record_with_more_than_convoy_knows_is_refused(change: dict[str, Any]) -> None:
    record = {"size": {"height": 224, "width": 224}}
    with pytest.raises(UsageError, match="describe it with --preprocess"):
        of_huggingface({**record, **change})


def test_the_users_members_replace_those_of_a_record() -> None:
    record = {"size": 224, "crop_pct": 0.875, "mean": 0.5}
    assert merge_members(record, {"mean": 0.1}) == {**record, "mean": 0.1}
    assert merge_members(record, {"letterbox_level": 0}) == {
        "size": 224, "mean": 0.5, "letterbox_level": 0,
    }  # fmt: skip
    assert merge_members(record, {"preset": "clip"}) == {"preset": "clip"}


def test_of_two_equal_labels_the_second_gets_its_index() -> None:
    assert distinct(["crane", "ship", "crane"]) == ("crane", "ship", "crane (2)")


def test_an_option_without_meaning_for_the_source_is_refused() -> None:
    changes: dict[str, dict[str, Any]] = {
        "onnx": {"weights": Path("w.safetensors")},
        "torch": {"download": True},
        "timm": {"run_code": True},
    }
    for name, change in changes.items():
        with pytest.raises(UsageError, match="has no meaning for"):
            all_sources()[name].open(Request(what="model", **change))


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"--timm needs timm, onnxscript; install convoy\["):
        all_sources()["timm"].open(Request(what="resnet18"))


NEW_SOURCE = '''
from training.importing.sources.base import Request, Source, SourceModel


class Zoo(Source):
    """A library that the test invents."""

    name = "zoo"
    metavar = "ANIMAL"
    help = "one of the zoo"

    def load(self, request: Request) -> SourceModel:
        """Its record knows the labels, and no preprocessing."""
        return SourceModel(name=request.what, graph=b"", origin="zoo", labels=("cat", "dog"))


SOURCE = Zoo()
'''


def test_one_file_adds_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zoo_models.py").write_text(NEW_SOURCE)
    path = [*training.importing.sources.__path__, str(tmp_path)]
    monkeypatch.setattr(training.importing.sources, "__path__", path)
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    assert "--zoo ANIMAL" in capsys.readouterr().out
    assert main(["import", "--zoo", "lion", "--examples", str(tmp_path)]) == 2
    assert "lion does not say how pictures become its input" in capsys.readouterr().err
