"""Two small versions of a model, and a service of them: what the benchmarks of releases play on."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import RunningService, running_service
from registry.core.paths import Home
from training.data.sources import load_dataset


@contextmanager
def two_versions(name: str) -> Iterator[tuple[Home, RunningService, bytes]]:
    """A home with two small versions, a service that follows its registry, and a picture for it."""
    with tempfile.TemporaryDirectory(prefix=f"convoy-{name}-") as folder:
        home = Home(Path(folder))
        prepare_two(home)
        image = load_dataset("digits", home.datasets).test.encode(0)
        with running_service(home.root, "models:/digits@champion", pull=True) as service:
            yield home, service, image


def prepare_two(home: Home) -> None:
    """Two versions, their plans chosen; the first is champion and lies on disk."""
    for epochs in ("2", "6"):
        run(home, "training", "--data", "digits", "--recipe", "dense", "--set", f"epochs={epochs}")
    for number in ("1", "2"):
        run(home, "registry", "plan", f"digits/{number}")
    run(home, "registry", "promote", "digits", "1")
    run(home, "registry", "pull", "models:/digits@champion")


def run(home: Home, *arguments: str) -> None:
    environment = {**os.environ, "CONVOY_HOME": str(home.root), "CONVOY_WORKERS": "2"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    subprocess.run(
        [sys.executable, "-m", *arguments], check=True, capture_output=True, env=environment
    )
