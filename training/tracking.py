"""Training runs in MLflow: parameters, metrics by epoch, pictures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import msgspec

from registry.store import ModelStore
from training.config import Recipe
from training.datasets import Dataset
from training.loop import Epoch


class Run:
    """The active MLflow run."""

    def __init__(self, run_id: str) -> None:
        self.id = run_id

    def log_start(self, recipe: Recipe, data: Dataset, seed: int, device: str) -> None:
        """What the run is of: recipe, data and their digests."""
        settings = msgspec.to_builtins(recipe)
        network = settings.pop("network")
        arguments = {f"network.{key}": value for key, value in network["args"].items()}
        mlflow.log_params({**settings, "network": network["name"], **arguments, "seed": seed})
        mlflow.log_params({f"data.{split}": count for split, count in data.counts.items()})
        mlflow.set_tags(
            {
                "recipe": recipe.name,
                "data": data.name,
                "data.sha256": data.sha256,
                "data.heldout_sha256": data.validation.sha256,
                "device": device,
            }
        )

    def log_epoch(self, epoch: Epoch) -> None:
        metrics = msgspec.to_builtins(epoch)
        mlflow.log_metrics(metrics, step=metrics.pop("number"))

    def log_metrics(self, metrics: dict[str, float]) -> None:
        mlflow.log_metrics(metrics)

    def log_report(self, folder: Path) -> None:
        mlflow.log_artifacts(str(folder), "report")

    def set_tag(self, key: str, value: Any) -> None:
        mlflow.set_tag(key, value)


@contextmanager
def start_run(store: ModelStore, experiment: str, name: str, nested: bool = False) -> Iterator[Run]:
    """A run that is marked finished, or failed when the body raises."""
    experiment_id = store.experiment(experiment)
    with mlflow.start_run(experiment_id=experiment_id, run_name=name, nested=nested) as active:
        yield Run(active.info.run_id)
