"""Two small versions of a model, and a service for them, for benchmarks of deployments."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import RunningService, running_service
from registry.core.paths import Paths
from training.data.sources import load_dataset


@contextmanager
def two_versions(name: str) -> Iterator[tuple[Paths, RunningService, bytes]]:
    """A home with two small versions, a service that follows its registry, and a picture."""
    with tempfile.TemporaryDirectory(prefix=f"convoy-{name}-") as folder:
        paths = Paths(Path(folder))
        prepare_two(paths)
        image = load_dataset("digits", paths.datasets).test.encode(0)
        with running_service(paths.root, "models:/digits@champion", pull=True) as service:
            yield paths, service, image


def prepare_two(paths: Paths) -> None:
    """Train two versions and choose their plans; the first is the champion and on disk."""
    for epochs in ("2", "6"):
        run(paths, "training", "--data", "digits", "--recipe", "dense", "--set", f"epochs={epochs}")
    for number in ("1", "2"):
        run(paths, "registry", "plan", f"digits/{number}")
    run(paths, "registry", "promote", "digits", "1")
    run(paths, "registry", "pull", "models:/digits@champion")


def run(paths: Paths, *arguments: str) -> None:
    environment = {**os.environ, "CONVOY_HOME": str(paths.root), "CONVOY_WORKERS": "2"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    subprocess.run(
        [sys.executable, "-m", *arguments], check=True, capture_output=True, env=environment
    )
