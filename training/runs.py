"""The two jobs of ``python -m training``: one run that ends in the registry, and a comparison."""

import logging
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from msgspec import Struct
from tqdm import tqdm

from registry.classifier import Classifier
from registry.contract import ModelVersion, sha256_hex
from registry.devices import choose_device, describe_device
from registry.home import Home
from registry.store import ModelStore
from training import report
from training.config import Recipe
from training.datasets import Dataset
from training.evaluate import Evaluation, accuracy_against_shift, evaluate
from training.loop import Trained, fit
from training.publish import build_manifest, publish
from training.tracking import Run, start_run

log = logging.getLogger(__name__)

EXPERIMENT = "convoy"
SHIFTS_PX = range(7)
THE_RULE = (
    "The validation pictures chose the epoch that was kept and decide promotions; "
    "the test pictures chose nothing and are only reported."
)


class Finished(Struct, frozen=True, kw_only=True):
    """One finished run: what it scored, and the version it became (None when not registered)."""

    run_id: str
    test: Evaluation
    validation: Evaluation
    seconds: float
    version: ModelVersion | None


def train_and_publish(
    data: Dataset,
    recipe: Recipe,
    model: str,
    home: Home,
    *,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    register: bool = True,
) -> Finished:
    """Train, evaluate, report, log, and register version N of ``model`` as ``challenger``.

    The registry is opened first: a training of an hour is not lost to one that is down. If it goes
    down meanwhile, the checkpoint stays, and ``resume`` publishes without training again.
    """
    chosen = choose_device(device)
    store = ModelStore(home)
    checkpoint = checkpoint_file(home, data, recipe, seed)
    with start_run(store, EXPERIMENT, f"{model} {recipe.name}") as run:
        run.log_start(recipe, data, seed, describe_device(chosen))
        started = time.perf_counter()
        trained = fit(
            recipe,
            data,
            chosen,
            seed,
            checkpoint=checkpoint,
            resume=resume,
            on_epoch=run.log_epoch,
        )
        seconds = time.perf_counter() - started
        run.set_tag("interrupted", trained.interrupted)
        classifier = Classifier(trained.program, chosen)
        validation = evaluate(classifier, data.validation)
        test = evaluate(classifier, data.test)
        metrics = {**validation.metrics("validation"), **test.metrics("test")}
        run.log_metrics({**metrics, "training_seconds": seconds})
        with tempfile.TemporaryDirectory(prefix="convoy-report-") as name:
            folder = Path(name)
            _write_run_report(folder, model, recipe, data, seed, trained, test, metrics, chosen)
            run.log_report(folder)
            version = None
            if register:
                manifest = build_manifest(
                    model, recipe, data, seed, describe_device(chosen), metrics
                )
                version = publish(
                    store, manifest, trained.program, data, validation, folder, chosen
                )
    checkpoint.unlink(missing_ok=True)
    return Finished(
        run_id=run.id, test=test, validation=validation, seconds=seconds, version=version
    )


def checkpoint_file(home: Home, data: Dataset, recipe: Recipe, seed: int) -> Path:
    """One file for each combination of data, recipe and seed."""
    key = sha256_hex(f"{data.sha256} {recipe} {seed}".encode())[:16]
    return home.checkpoints / f"{re.sub(r'[^A-Za-z0-9-]', '_', data.name)}-{recipe.name}-{key}.pt"


def _write_run_report(
    folder: Path,
    model: str,
    recipe: Recipe,
    data: Dataset,
    seed: int,
    trained: Trained,
    test: Evaluation,
    metrics: dict[str, float],
    device: torch.device,
) -> None:
    pictures = report.run_pictures(
        trained.program, trained.history, trained.best, test, data, device
    )
    arguments = ", ".join(f"{key} {value}" for key, value in recipe.network.args.items())
    facts = [
        *_data_facts(data),
        ("network", f"{recipe.network.name} {arguments}"),
        ("parameters", f"{count_parameters(trained):,}"),
        ("seed", seed),
        ("device", describe_device(device)),
        ("kept epoch", f"{trained.best.number} of {len(trained.history)}"),
        *metrics.items(),
    ]
    notes = [THE_RULE]
    if trained.interrupted:
        notes.append("The run was interrupted; the best epoch until then was kept.")
    if data.problems:
        notes.append(f"{len(data.problems)} files were left out: " + "; ".join(data.problems[:20]))
    page = report.html_page(f"{model}: {recipe.name}", facts, pictures, notes=notes)
    report.write_report(folder, page, pictures)


def _data_facts(data: Dataset) -> list[tuple[str, str]]:
    counts = ", ".join(f"{count:,} {split}" for split, count in data.counts.items())
    return [("data", f"{data.name}: {counts}"), ("data digest", data.sha256)]


def count_parameters(trained: Trained) -> int:
    return sum(parameter.numel() for parameter in trained.program.parameters())


class Comparison(Struct, frozen=True, kw_only=True):
    """Several recipes on the same data, one list entry a seed.

    ``shift_accuracies[recipe][seed][px]`` is the test accuracy with pictures moved by px pixels.
    """

    accuracies: dict[str, list[float]]
    shift_accuracies: dict[str, list[list[float]]]
    parameters: dict[str, int]
    seconds: dict[str, list[float]]
    run_id: str

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heading and rows, for terminals and pages."""
        heading = [
            "recipe",
            "test accuracy",
            "seeds",
            "parameters",
            "seconds",
            "shifted by 2 px",
            "by 4 px",
        ]
        return heading, [
            [
                recipe,
                _mean_deviation(values),
                str(len(values)),
                f"{self.parameters[recipe]:,}",
                f"{np.mean(self.seconds[recipe]):.0f}",
                *(
                    _mean_deviation([run[px] for run in self.shift_accuracies[recipe]])
                    for px in (2, 4)
                ),
            ]
            for recipe, values in self.accuracies.items()
        ]


def compare(
    data: Dataset, recipes: list[Recipe], seeds: int, home: Home, device: str = "auto"
) -> Comparison:
    """Train every recipe with seeds 0 … ``seeds`` - 1 on ``data`` and log what they are worth.

    Nothing is registered: the result is a run with a table, curves and a page.
    """
    chosen = choose_device(device)
    store = ModelStore(home)
    accuracies: dict[str, list[float]] = {recipe.name: [] for recipe in recipes}
    shifted: dict[str, list[list[float]]] = {recipe.name: [] for recipe in recipes}
    seconds: dict[str, list[float]] = {recipe.name: [] for recipe in recipes}
    parameters: dict[str, int] = {}
    title = f"compare {', '.join(accuracies)}"
    with start_run(store, EXPERIMENT, title) as run:
        jobs = [(recipe, seed) for recipe in recipes for seed in range(seeds)]
        for recipe, seed in tqdm(jobs, unit="run", desc="comparing", disable=None):
            with start_run(store, EXPERIMENT, f"{recipe.name} seed {seed}", nested=True) as child:
                child.log_start(recipe, data, seed, describe_device(chosen))
                started = time.perf_counter()
                trained = fit(recipe, data, chosen, seed, on_epoch=child.log_epoch)
                seconds[recipe.name].append(time.perf_counter() - started)
                classifier = Classifier(trained.program, chosen)
                test = evaluate(classifier, data.test)
                metrics = test.metrics("test")
                child.log_metrics(metrics)
                with tempfile.TemporaryDirectory(prefix="convoy-report-") as name:
                    folder = Path(name)
                    _write_run_report(
                        folder, "compare", recipe, data, seed, trained, test, metrics, chosen
                    )
                    child.log_report(folder)
                accuracies[recipe.name].append(test.accuracy)
                shifted[recipe.name].append(
                    accuracy_against_shift(classifier, data.test, SHIFTS_PX)
                )
                parameters[recipe.name] = count_parameters(trained)
                log.info("%s, seed %d: test accuracy %.4f", recipe.name, seed, test.accuracy)
        comparison = Comparison(
            accuracies=accuracies,
            shift_accuracies=shifted,
            parameters=parameters,
            seconds=seconds,
            run_id=run.id,
        )
        _log_comparison(run, comparison, data, title)
    return comparison


def _log_comparison(run: Run, comparison: Comparison, data: Dataset, title: str) -> None:
    for recipe, values in comparison.accuracies.items():
        means = {f"{recipe}_accuracy_mean": float(np.mean(values))}
        if len(values) > 1:
            means[f"{recipe}_accuracy_deviation"] = float(np.std(values, ddof=1))
        run.log_metrics(means)
        for px, accuracy in enumerate(np.mean(comparison.shift_accuracies[recipe], axis=0)):
            run.log_metrics({f"{recipe}_accuracy_shifted_{px}px": float(accuracy)})
    pictures = {
        "accuracy": report.to_png(report.accuracy_bars(comparison.accuracies)),
        "accuracy against shift": report.to_png(report.shift_curves(comparison.shift_accuracies)),
    }
    page = report.html_page(title, _data_facts(data), pictures, comparison.table(), [THE_RULE])
    with tempfile.TemporaryDirectory(prefix="convoy-compare-") as name:
        report.write_report(Path(name), page, pictures)
        run.log_report(Path(name))


def _mean_deviation(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
