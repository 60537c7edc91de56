"""Draws a training run, and writes one page with all drawings.

Matplotlib draws PNG files. ``report.html`` contains a copy of them, so that it can be opened from a
folder, from MLflow's page of the run or from an e-mail.
"""

import base64
import functools
import html
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # needs no display, and starts no thread
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from registry.model.image.decode import Pixels
from registry.model.preprocessed_model import PreprocessedModel
from training.data.sources import Dataset, Examples
from training.fitting.loop import Epoch
from training.publishing.evaluate import Evaluation

log = logging.getLogger(__name__)

# Names of classes may contain $; it must not start a formula.
matplotlib.rcParams.update({"text.parse_math": False, "text.usetex": False})

LARGEST_MATRIX_TEXT = 20  # with more classes, numbers in the cells are too small to read
MAPS_SHOWN = 32

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2430; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse } td, th { padding: .25rem .9rem .25rem 0; text-align: left;
       border-bottom: 1px solid #e3e7ec; font-variant-numeric: tabular-nums }
img { max-width: 100% } figcaption, .note { color: #5a6675 } figure { margin: 0 }
"""


def learning_curves(history: Sequence[Epoch], best: Epoch) -> Figure:
    """Loss and accuracy of training and validation, by epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    numbers = [epoch.number for epoch in history]
    for axes, title, train, validation in (
        (left, "loss", [e.train_loss for e in history], [e.validation_loss for e in history]),
        (
            right,
            "accuracy",
            [e.train_accuracy for e in history],
            [e.validation_accuracy for e in history],
        ),
    ):
        axes.plot(numbers, train, "o-", markersize=3, label="training")
        axes.plot(numbers, validation, "o-", markersize=3, label="validation")
        axes.axvline(best.number, color="grey", linewidth=0.8, linestyle="--", label="kept epoch")
        axes.set(xlabel="epoch", ylabel=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    right.legend()
    return figure


def confusion_matrix(evaluation: Evaluation, labels: Sequence[str]) -> Figure:
    """The confusion matrix: rows are true classes, columns predicted ones, colours row shares."""
    counts = evaluation.confusion()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(12.0, 2.5 + 0.5 * len(labels))
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(labels))
    axes.set_xticks(ticks, labels, rotation=90)
    axes.set_yticks(ticks, labels)
    axes.set(xlabel="predicted", ylabel="true")
    if len(labels) <= LARGEST_MATRIX_TEXT:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(
                column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=7
            )
    return figure


def worst_mistakes(evaluation: Evaluation, examples: Examples, labels: Sequence[str]) -> Figure:
    """The wrongly classified pictures about which the network was most confident."""
    positions = evaluation.worst_mistakes(24)
    columns = 8
    rows = max(1, -(-len(positions) // columns))
    figure, grid = plt.subplots(
        rows, columns, figsize=(10, 1.8 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, position in zip(grid.flat, positions, strict=False):
        predicted = int(evaluation.predicted[position])
        _show(axes, examples.pixels[position])
        axes.set_title(
            f"{labels[predicted]} {evaluation.probabilities[position, predicted]:.0%}\n"
            f"is {labels[evaluation.labels[position]]}",
            fontsize=7,
        )
    if not positions:
        grid.flat[0].set_title("no mistakes", loc="left")
    return figure


def first_kernels(preprocessed: PreprocessedModel) -> Figure | None:
    """The first convolution's kernels, averaged over input channels; None if there is none."""
    for module in preprocessed.network.modules():
        if isinstance(module, nn.Conv2d):
            return _kernels(module.weight.detach().float().cpu().numpy().mean(axis=1), "kernel")
    return None


def first_units(preprocessed: PreprocessedModel, shape: tuple[int, int, int]) -> Figure | None:
    """The weights of a dense network's first units, each laid out like the input picture."""
    height, width, channels = shape
    for module in preprocessed.network.modules():
        if isinstance(module, nn.Linear) and module.in_features == height * width * channels:
            weights = module.weight.detach().float().cpu().numpy()
            return _kernels(weights.reshape(-1, channels, height, width).mean(axis=1), "unit")
    return None


def feature_maps(
    preprocessed: PreprocessedModel, pixels: Pixels, device: str
) -> dict[str, NDArray[np.float32]]:
    """The output of each convolution and pooling layer for one picture, uint8 (H, W, C).

    Returns:
        Maps (C, H, W) by the layer's name.
    """
    outputs: dict[str, Tensor] = {}
    layers = [
        (name, module)
        for name, module in preprocessed.network.named_modules()
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d)
    ]
    hooks = [
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: outputs.__setitem__(name, output)
        )
        for name, module in layers
    ]
    try:
        with torch.inference_mode():
            preprocessed(torch.from_numpy(pixels[None]).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: outputs[name][0].float().cpu().numpy() for name, _ in layers}


def shift_curves(curves: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Accuracy against shift by recipe: a thin line for each seed, a thick one for the mean."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, (recipe, runs) in enumerate(curves.items()):
        colour = f"C{number}"
        for run in runs:
            axes.plot(run, color=colour, alpha=0.3, linewidth=1)
        axes.plot(np.mean(runs, axis=0), "o-", color=colour, label=recipe)
    axes.set(xlabel="test pictures moved by … pixels", ylabel="accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def accuracy_bars(accuracies: Mapping[str, Sequence[float]]) -> Figure:
    """Test accuracies by recipe: a dot for each seed, and a bar for mean and deviation."""
    figure, axes = plt.subplots(figsize=(5, 4.2), layout="constrained")
    for number, values in enumerate(accuracies.values()):
        axes.errorbar(
            number, np.mean(values), yerr=deviation(values), fmt="_", markersize=26, capsize=6
        )
        axes.plot([number + 0.12] * len(values), values, "o", markersize=4, color=f"C{number}")
    axes.set_xticks(range(len(accuracies)), list(accuracies))
    axes.set(ylabel="test accuracy", xlim=(-0.6, len(accuracies) - 0.4))
    axes.grid(alpha=0.3, axis="y")
    return figure


class Drawings:
    """PNG files by title; if a drawing fails, the others and the report are still made."""

    def __init__(self) -> None:
        self.pictures: dict[str, bytes] = {}
        self.failures: list[str] = []

    def add(self, title: str, draw: Callable[[], Figure | None]) -> None:
        """Add the figure that ``draw`` returns; if it returns None, add nothing."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # matplotlib warns of each letter the font lacks
                if (figure := draw()) is not None:
                    self.pictures[title] = to_png(figure)
        except Exception as error:  # noqa: BLE001 - no failed drawing may lose a finished training
            if not self.failures:
                log.warning("the report lacks a drawing: %s: %s", title, error)
            self.failures.append(f"{title} ({type(error).__name__}: {error})")
            plt.close("all")

    @property
    def notes(self) -> list[str]:
        """One sentence that lists the drawings that failed, and why; [] if none did."""
        return [f"Could not be drawn: {'; '.join(self.failures)}."] if self.failures else []


def draw_run(
    preprocessed: PreprocessedModel,
    history: Sequence[Epoch],
    best: Epoch,
    evaluation: Evaluation,
    data: Dataset,
    device: str,
) -> Drawings:
    """The drawings of one run, in the order of the page."""
    example = data.test.pixels[0]
    drawings = Drawings()
    drawings.add("learning curves", lambda: learning_curves(history, best))
    drawings.add("confusion matrix", lambda: confusion_matrix(evaluation, data.labels))
    drawings.add("worst mistakes", lambda: worst_mistakes(evaluation, data.test, data.labels))
    drawings.add(
        "first layer",
        lambda: first_kernels(preprocessed) or first_units(preprocessed, data.preprocess.shape),
    )
    drawings.add("example picture", lambda: _one_picture(example, data.labels[data.test.labels[0]]))
    maps: dict[str, NDArray[np.float32]] = {}
    drawings.add("feature maps", lambda: maps.update(feature_maps(preprocessed, example, device)))
    for name in maps:
        drawings.add(f"feature maps after {name}", functools.partial(_maps, name, maps[name]))
    return drawings


def rehearse(data: Dataset) -> None:
    """Draw the labels once before training, so that a drawing that fails is reported then."""
    few = Evaluation(
        data.test.labels, np.full((len(data.test), len(data.labels)), 1 / len(data.labels), "f4")
    )
    drawings = Drawings()
    drawings.add("confusion matrix", lambda: confusion_matrix(few, data.labels))
    drawings.add("worst mistakes", lambda: worst_mistakes(few, data.test, data.labels))


def file_name(title: str) -> str:
    """The name of the PNG file for a drawing: ``learning_curves.png``."""
    return title.replace(" ", "_").replace(".", "_") + ".png"


def html_page(
    title: str,
    facts: Iterable[tuple[str, Any]],
    pictures: dict[str, bytes],
    table: tuple[Sequence[str], Sequence[Sequence[Any]]] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The text of one self-contained page: an optional table, facts, notes and pictures."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
    ]
    if table is not None:
        head, rows = table
        parts += ["<table>", _row("th", head)]
        parts += [_row("td", row) for row in rows]
        parts.append("</table>")
    parts.append("<table>")
    parts += [_row("td", (name, _text(value))) for name, value in facts]
    parts.append("</table>")
    parts += [f"<p class=note>{html.escape(note)}</p>" for note in notes]
    for name, png in pictures.items():
        source = base64.b64encode(png).decode()
        parts.append(
            f"<h2>{html.escape(name.capitalize())}</h2>"
            f"<figure><img alt='{html.escape(name)}' src='data:image/png;base64,{source}'></figure>"
        )
    return "\n".join(parts) + "\n"


def write_report(folder: Path, page: str, pictures: dict[str, bytes]) -> None:
    """Write ``report.html``, and each picture as a file of its own, to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(page, encoding="utf-8")
    for title, png in pictures.items():
        (folder / file_name(title)).write_bytes(png)


def to_png(figure: Figure) -> bytes:
    """``figure`` as a PNG file, at 110 dots an inch; the figure is closed."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _kernels(kernels: NDArray[np.float32], what: str) -> Figure:
    """Up to 64 kernels as small pictures: positive weights red, negative ones blue."""
    shown = kernels[:64]
    rows = -(-len(shown) // 16)
    figure, grid = plt.subplots(rows, 16, figsize=(10, 0.66 * rows + 0.3), squeeze=False)
    limit = float(np.abs(shown).max()) or 1.0
    for axes in grid.flat:
        axes.axis("off")
    for axes, kernel in zip(grid.flat, shown, strict=False):
        axes.imshow(kernel, cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure.suptitle(f"{len(shown)} of {len(kernels)}: one square is one {what}", fontsize=9)
    return figure


def _maps(name: str, maps: NDArray[np.float32]) -> Figure:
    shown = maps[:MAPS_SHOWN]
    rows = -(-len(shown) // 16)
    figure, grid = plt.subplots(rows, 16, figsize=(10, 0.7 * rows + 0.3), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, each in zip(grid.flat, shown, strict=False):
        axes.imshow(each, cmap="viridis")
    size = f"{maps.shape[1]}×{maps.shape[2]}"
    figure.suptitle(f"{name}: {len(shown)} of {len(maps)} maps of {size}", fontsize=9)
    return figure


def _one_picture(pixels: Pixels, label: str) -> Figure:
    figure, axes = plt.subplots(figsize=(2, 2.2))
    _show(axes, pixels)
    axes.axis("off")
    axes.set_title(label, fontsize=9)
    return figure


def _show(axes: Any, pixels: Pixels) -> None:
    if pixels.shape[2] == 1:
        axes.imshow(pixels[..., 0], cmap="gray", vmin=0, vmax=255)
    else:
        axes.imshow(pixels)


def _row(tag: str, cells: Iterable[Any]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(_text(cell))}</{tag}>" for cell in cells)


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
