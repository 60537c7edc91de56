"""A home with a trained version, and a service that serves it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import made_once, wait_for
from tests.e2e.processes import Service, run


@pytest.fixture(scope="session")
def trained_paths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two trained versions: 1 is champion, 2 was trained longer and is challenger."""

    def make(paths: Path) -> None:
        quick = ("--data", "digits", "--recipe", "dense", "--device", "cpu")
        for version, epochs in ((1, 2), (2, 8)):
            trained = run(paths, "training", *quick, "--set", f"epochs={epochs}", "--json")
            assert trained.returncode == 0, trained.stderr
            assert json.loads(trained.stdout)["version"] == version
            if version == 1:
                assert run(paths, "registry", "promote", "digits", "1").returncode == 0

    return made_once(tmp_path_factory, "trained", make)


@pytest.fixture
def paths(trained_paths: Path, tmp_path: Path) -> Path:
    """A copy of the trained home with its artefacts, for one test."""
    copied: Path = shutil.copytree(trained_paths, tmp_path / "home")
    return copied


@pytest.fixture
def service(paths: Path) -> Iterator[Service]:
    service = Service(paths)
    try:
        wait_for(service.is_ready, "the service did not become ready")
        yield service
    finally:
        if service.process.is_running():
            service.stop()
