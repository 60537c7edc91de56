"""MLflow as training uses it: runs with parameters, metrics by epoch and pictures."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import msgspec

from registry.core.errors import ConvoyError, RegistryUnavailable
from registry.store.experiments import open_experiment
from registry.store.mlflow_store import ModelStore
from training.data.sources import Dataset
from training.fitting.loop import Epoch
from training.fitting.recipes import Recipe

log = logging.getLogger(__name__)

# With these, MLflow would continue a run, or use an experiment, of the shell that started Convoy.
INHERITED = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")


class Run:
    """The active MLflow run. Its methods raise ``RegistryUnavailable``."""

    def __init__(self, run_id: str, store: ModelStore) -> None:
        self.id = run_id
        self._store = store
        self._unlogged: list[Epoch] = []
        self._warned = False

    def log_start(self, recipe: Recipe, data: Dataset, seed: int, device: str) -> None:
        """Log the recipe, the data set and its digests, the seed and the device."""
        settings = msgspec.to_builtins(recipe)
        network = settings.pop("network")
        arguments = {f"network.{key}": value for key, value in network["args"].items()}
        with self._store.connection.errors():
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
        """Log the metrics of ``epoch``; if MLflow does not answer, send them with the next epoch's.

        So a training survives a registry that does not answer for some epochs.
        """
        self._unlogged.append(epoch)
        try:
            self._log_epochs()
        except RegistryUnavailable as error:
            if not self._warned:
                log.warning("metrics will be logged later, and training goes on: %s", error)
            self._warned = True

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Log the scores of the whole run, after those of epochs that MLflow has not got yet.

        Raises:
            RegistryUnavailable: MLflow did not take them.
        """
        self._log_epochs()
        with self._store.connection.errors():
            mlflow.log_metrics(metrics)

    def log_report(self, folder: Path) -> None:
        """Upload all files of ``folder`` as the run's artifacts below ``report/``.

        Raises:
            RegistryUnavailable: MLflow did not take them.
        """
        with self._store.connection.errors():
            mlflow.log_artifacts(str(folder), "report")

    def set_tag(self, key: str, value: Any) -> None:
        """Set a tag of the run; MLflow stores ``value`` as text.

        Raises:
            RegistryUnavailable: MLflow did not take it.
        """
        with self._store.connection.errors():
            mlflow.set_tag(key, value)

    def _log_epochs(self) -> None:
        while self._unlogged:
            metrics = msgspec.to_builtins(self._unlogged[0])
            with self._store.connection.errors():
                mlflow.log_metrics(metrics, step=metrics.pop("number"))
            self._unlogged.pop(0)


@contextmanager
def start_run(store: ModelStore, experiment: str, name: str, nested: bool = False) -> Iterator[Run]:
    """A run that ends as finished, as failed if the body raises, or as killed after Ctrl-C.

    Raises:
        RegistryUnavailable: MLflow did not start it.
    """
    for variable in INHERITED:
        if value := os.environ.pop(variable, None):
            log.warning("%s=%s is ignored: each training starts its own run", variable, value)
    experiment_id = open_experiment(store.connection, experiment)
    with store.connection.errors():
        active = mlflow.start_run(experiment_id=experiment_id, run_name=name, nested=nested)
    status = "FAILED"
    try:
        yield Run(active.info.run_id, store)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        try:
            with store.connection.errors():
                mlflow.end_run(status)
        except ConvoyError as error:  # must not hide an error of the body
            log.warning("run %s cannot be marked %s: %s", active.info.run_id, status, error)


def run_torch_flavour(folder: Path) -> Any:
    """The network in ``folder``, which ``mlflow.pytorch`` wrote. Runs the code that it holds."""
    import mlflow.pytorch

    # Only an import does this, if its user says --run-code; serving never does.
    return mlflow.pytorch.load_model(str(folder), map_location="cpu")  # noqa: TID251
