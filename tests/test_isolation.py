"""No test and no shared fixture sees the registry of an earlier one."""

import os
from pathlib import Path

import pytest

from tests.conftest import made_once

VARIABLE = "MLFLOW_TRACKING_URI"
SEEN: list[str | None] = []


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``empty_registry``: MLflow writes its registry into the environment while this is made."""

    def make(_: Path) -> None:
        SEEN.append(os.environ.get(VARIABLE))
        os.environ[VARIABLE] = "sqlite:///of-a-shared-fixture.db"

    os.environ[VARIABLE] = "sqlite:///of-an-earlier-test.db"
    return made_once(tmp_path_factory, f"isolation-{os.getpid()}", make)


@pytest.mark.usefixtures("shared")
def test_a_shared_fixture_starts_and_ends_without_a_registry() -> None:
    assert SEEN == [None]
    assert VARIABLE not in os.environ


def test_what_a_test_leaves_is_not_brought_back() -> None:
    """The fixture that cleans up runs first here, as it does for every test."""
    assert VARIABLE not in os.environ
    os.environ[VARIABLE] = "sqlite:///of-this-test.db"


def test_the_next_test_has_no_registry() -> None:
    assert VARIABLE not in os.environ
