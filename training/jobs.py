"""The two jobs of ``convoy train``: train and publish one version, or compare recipes."""

import logging
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import torch
from msgspec import Struct
from tqdm import tqdm

from registry.core.devices import choose_device, describe_device
from registry.core.errors import UsageError
from registry.core.paths import Paths
from registry.model.classifier import Classifier
from registry.model.plans.torch_eager import eager_classifier
from registry.model.refs import ModelVersion
from registry.store.mlflow_store import ModelStore
from training.data.sources import Dataset
from training.fitting.checkpoint import checkpoint_file, only_training
from training.fitting.loop import Trained, fit
from training.fitting.recipes import Recipe
from training.fitting.steps import announce_steps
from training.publishing import report
from training.publishing.evaluate import Evaluation, accuracy_against_shift, evaluate
from training.publishing.publish import build_manifest, publish
from training.publishing.tracking import Run, start_run

log = logging.getLogger(__name__)

EXPERIMENT = "convoy"
SHIFTS_PX = range(7)
SHOWN_PROBLEMS = 1000
THE_RULE = (
    "The validation pictures decided which epoch was kept, and decide promotions. "
    "The test pictures decided nothing: their scores are only reported."
)


class Finished(Struct, frozen=True, kw_only=True):
    """One training run: the kept weights, their scores, and how long the training took."""

    run_id: str
    trained: Trained
    classifier: Classifier
    validation: Evaluation
    test: Evaluation
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """The scores by name, such as ``validation_accuracy`` or ``test_log_loss``."""
        return {**self.validation.metrics("validation"), **self.test.metrics("test")}

    @property
    def parameters(self) -> int:
        """The number of weights that the network has, whether or not they were trained."""
        return sum(parameter.numel() for parameter in self.trained.preprocessed.parameters())


def train_and_publish(  # noqa: PLR0913 - keyword-only options
    data: Dataset,
    recipe: Recipe,
    model: str,
    paths: Paths,
    *,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    register: bool = True,
) -> tuple[Finished, ModelVersion | None]:
    """Train, evaluate, report, log, and register the next version of ``model`` as ``challenger``.

    The registry, the names and the drawings are tried before the training. If publishing fails
    later, or the run is interrupted, the checkpoint stays, and ``resume`` continues from it.

    Returns:
        The run, and its version (None when ``register`` is False).
    """
    chosen = choose_device(device)
    store = ModelStore(paths)
    checkpoint = checkpoint_file(paths, data, recipe, seed)
    with (
        only_training(checkpoint),
        tempfile.TemporaryDirectory(prefix="convoy-report-") as name,
    ):
        _rehearse(store, data, recipe, model, seed, chosen, register=register)
        with start_run(store, EXPERIMENT, f"{model} {recipe.name}") as run:
            report_folder = Path(name)
            finished = _train(
                run, data, recipe, model, seed, chosen, report_folder, checkpoint, resume
            )
            version = None
            if register:
                manifest = build_manifest(
                    model, recipe, data, seed, describe_device(chosen), finished.metrics
                )
                preprocessed = finished.trained.preprocessed
                version = publish(
                    store, manifest, preprocessed, data, finished.validation, report_folder, chosen
                )
        if not finished.trained.interrupted:
            checkpoint.unlink(missing_ok=True)
    return finished, version


def _rehearse(
    store: ModelStore,
    data: Dataset,
    recipe: Recipe,
    model: str,
    seed: int,
    device: str,
    *,
    register: bool,
) -> None:
    """Try the registry, the names and the drawings, so that they fail before the first epoch.

    Without ``register``, this skips the steps that only publishing needs.

    Raises:
        UsageError: the names of the classes cannot be published.
        RegistryUnavailable: the registry does not answer.
        PromotionRefused: no version can be published under the model's name.
    """
    announce_steps(recipe, data)
    report.rehearse(data)
    if not register:
        return
    store.names.check(model)
    try:
        build_manifest(model, recipe, data, seed, describe_device(device), {}).to_json()
    except ValueError as error:  # two labels that are equal, for example
        raise UsageError(f"{data.name} cannot be published: {error}; rename its classes") from error


def _train(  # noqa: PLR0913 - what a run is made of
    run: Run,
    data: Dataset,
    recipe: Recipe,
    title: str,
    seed: int,
    device: str,
    report_folder: Path,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Finished:
    """Train and evaluate; log to ``run`` and write the report to ``report_folder``."""
    run.log_start(recipe, data, seed, describe_device(device))
    started = time.perf_counter()
    trained = fit(
        recipe,
        data,
        torch.device(device),
        seed,
        checkpoint=checkpoint,
        resume=resume,
        on_epoch=run.log_epoch,
    )
    seconds = time.perf_counter() - started
    classifier = eager_classifier(trained.preprocessed, device)
    finished = Finished(
        run_id=run.id,
        trained=trained,
        classifier=classifier,
        validation=evaluate(classifier, data.validation),
        test=evaluate(classifier, data.test),
        seconds=seconds,
    )
    run.set_tag("interrupted", trained.interrupted)
    run.log_metrics({**finished.metrics, "training_seconds": seconds})
    _write_run_report(
        report_folder, f"{title}: {recipe.name}", recipe, data, seed, finished, device
    )
    run.log_report(report_folder)
    return finished


def _write_run_report(
    folder: Path,
    title: str,
    recipe: Recipe,
    data: Dataset,
    seed: int,
    finished: Finished,
    device: str,
) -> None:
    trained = finished.trained
    drawings = report.draw_run(
        trained.preprocessed, trained.history, trained.best, finished.test, data, device
    )
    arguments = ", ".join(f"{key} {value}" for key, value in recipe.network.args.items())
    facts = [
        *_data_facts(data),
        ("network", f"{recipe.network.name} {arguments}"),
        ("parameters", f"{finished.parameters:,}"),
        ("seed", seed),
        ("device", describe_device(device)),
        ("kept epoch", f"{trained.best.number} of {len(trained.history)}"),
        *finished.metrics.items(),
    ]
    notes = [THE_RULE, *data.notes, *drawings.notes]
    if trained.interrupted:
        notes.append("The run was interrupted. The best epoch until then was kept.")
    if data.problems:
        shown = "; ".join(data.problems[:SHOWN_PROBLEMS])
        notes.append(f"{len(data.problems)} entries of the folder were left out: {shown}")
    page = report.html_page(title, facts, drawings.pictures, notes=notes)
    report.write_report(folder, page, drawings.pictures)


def _data_facts(data: Dataset) -> list[tuple[str, str]]:
    counts = ", ".join(f"{count:,} {split}" for split, count in data.counts.items())
    return [("data", f"{data.name}: {counts}"), ("data digest", data.sha256)]


class ComparedRun(Struct, frozen=True, kw_only=True):
    """Test results of one training of a comparison.

    ``shifted_accuracies[px]`` is the test accuracy with the pictures moved by px pixels.
    """

    recipe: str
    seed: int
    accuracy: float
    shifted_accuracies: tuple[float, ...]
    parameters: int
    seconds: float


class Comparison(Struct, frozen=True):
    """The results of several recipes on the same data, each trained with several seeds.

    ``run_id`` is the MLflow run that holds the table, the curves and the page.
    """

    runs: tuple[ComparedRun, ...]
    run_id: str

    def by_recipe(self) -> dict[str, list[ComparedRun]]:
        """The runs by name of their recipe; recipes and runs keep their order."""
        grouped: dict[str, list[ComparedRun]] = {}
        for run in self.runs:
            grouped.setdefault(run.recipe, []).append(run)
        return grouped

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heading and rows for a terminal or a page: mean ± standard deviation over the seeds."""
        heading = ["recipe", "test accuracy", "seeds", "parameters", "seconds"]
        heading += ["shifted by 2 px", "by 4 px"]
        return heading, [
            [
                recipe,
                _mean_deviation([run.accuracy for run in runs], ".4f"),
                str(len(runs)),
                f"{runs[0].parameters:,}",
                _mean_deviation([run.seconds for run in runs], ".0f"),
                *(
                    _mean_deviation([run.shifted_accuracies[px] for run in runs], ".4f")
                    for px in (2, 4)
                ),
            ]
            for recipe, runs in self.by_recipe().items()
        ]


def compare(
    data: Dataset, recipes: list[Recipe], seeds: int, paths: Paths, device: str = "auto"
) -> Comparison:
    """Train every recipe on ``data`` with seeds 0 … ``seeds`` - 1, and log how accurate each is.

    No version is registered. The result is an MLflow run with a table, curves and a page; nested in
    it, each training has a run with its own report. Ctrl-C ends the comparison, because a training
    that was cut short cannot be compared.
    """
    chosen = choose_device(device)
    store = ModelStore(paths)
    title = f"compare {', '.join(recipe.name for recipe in recipes)}"
    runs: list[ComparedRun] = []
    for recipe in recipes:
        announce_steps(recipe, data)
    with start_run(store, EXPERIMENT, title) as run:
        jobs = [(recipe, seed) for recipe in recipes for seed in range(seeds)]
        for recipe, seed in tqdm(jobs, unit="run", desc="comparing", disable=None):
            with (
                start_run(store, EXPERIMENT, f"{recipe.name} seed {seed}", nested=True) as child,
                tempfile.TemporaryDirectory(prefix="convoy-report-") as name,
            ):
                finished = _train(child, data, recipe, "compare", seed, chosen, Path(name))
            if finished.trained.interrupted:
                raise KeyboardInterrupt
            shifted = accuracy_against_shift(finished.classifier, data.test, SHIFTS_PX)
            runs.append(
                ComparedRun(
                    recipe=recipe.name,
                    seed=seed,
                    accuracy=finished.test.accuracy,
                    shifted_accuracies=tuple(shifted),
                    parameters=finished.parameters,
                    seconds=finished.seconds,
                )
            )
            log.info("%s, seed %d: test accuracy %.4f", recipe.name, seed, finished.test.accuracy)
        comparison = Comparison(tuple(runs), run.id)
        _log_comparison(run, comparison, data, title)
    return comparison


def _log_comparison(run: Run, comparison: Comparison, data: Dataset, title: str) -> None:
    accuracies: dict[str, list[float]] = {}
    curves: dict[str, list[tuple[float, ...]]] = {}
    for recipe, runs in comparison.by_recipe().items():
        accuracies[recipe] = [each.accuracy for each in runs]
        curves[recipe] = [each.shifted_accuracies for each in runs]
        run.log_metrics(
            {
                f"{recipe}_accuracy_mean": float(np.mean(accuracies[recipe])),
                f"{recipe}_accuracy_deviation": report.deviation(accuracies[recipe]),
                **{
                    f"{recipe}_accuracy_shifted_{px}px": float(accuracy)
                    for px, accuracy in enumerate(np.mean(curves[recipe], axis=0))
                },
            }
        )
    drawings = report.Drawings()
    drawings.add("accuracy", lambda: report.accuracy_bars(accuracies))
    drawings.add("accuracy against shift", lambda: report.shift_curves(curves))
    notes = [THE_RULE, *drawings.notes]
    page = report.html_page(title, _data_facts(data), drawings.pictures, comparison.table(), notes)
    with tempfile.TemporaryDirectory(prefix="convoy-compare-") as name:
        report.write_report(Path(name), page, drawings.pictures)
        (Path(name) / "comparison.json").write_bytes(msgspec.json.encode(comparison.runs))
        run.log_report(Path(name))


def _mean_deviation(values: list[float], form: str) -> str:
    mean = f"{np.mean(values):{form}}"
    return f"{mean} ± {report.deviation(values):{form}}" if len(values) > 1 else mean
