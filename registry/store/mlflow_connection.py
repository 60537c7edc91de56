"""The connection to MLflow, which the registry and the tracking of training runs share.

It opens the database or server, keeps artefact places true when ``CONVOY_HOME`` has moved, and
turns MLflow's many exceptions into Convoy's. Importing it costs seconds and 170 MB: nothing that
serves may do so.
"""

import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

# A registry that is down must not hold its reader for minutes (MLflow's own defaults: 245 s).
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

import mlflow
import requests
import sqlalchemy.exc
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from registry.core.errors import RegistryUnavailable, VersionNotFound
from registry.core.paths import Paths

log = logging.getLogger(__name__)
logging.getLogger("alembic").setLevel(logging.WARNING)  # MLflow's migrations, step by step

SQLITE = "sqlite:///"
# On experiments whose artefacts lie in the home of their database.
HOME_TAG = "convoy.artifacts_in_home"
# Where MLflow 3.17 keeps absolute places of artefacts.
PLACES = (
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
    ("experiments", "artifact_location"),
)
BUSY_TIMEOUT_S = 20


class MlflowConnection:
    """MLflow's client for the database or server of a home."""

    def __init__(self, paths: Paths) -> None:
        self.uri = paths.tracking_uri
        self._artifacts = paths.artifacts
        mlflow.set_tracking_uri(self.uri)
        with self.errors():
            if not self.uri.startswith(SQLITE):
                self.client = MlflowClient(self.uri)
                return
            database = Path(self.uri.removeprefix(SQLITE))
            database.parent.mkdir(parents=True, exist_ok=True)
            with _alone_in(database.parent):
                self.client = MlflowClient(self.uri)
                # Now, while no other process makes the same tables.
                self.client.search_registered_models(max_results=1)
                if database.parent == paths.root:
                    _relocate(database, self._artifacts.as_uri())

    def experiment(self, name: str) -> str:
        """The id of the experiment ``name``, made if there is none, restored if it was deleted."""
        with self.errors():
            found = self.client.get_experiment_by_name(name)
            if found is None:
                return self._create_experiment(name)
            if found.lifecycle_stage == "deleted":
                log.warning(
                    "the experiment %s was deleted in MLflow; it is restored, with its runs", name
                )
                self.client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)

    def _create_experiment(self, name: str) -> str:
        # A server chooses its own place; a database of ours would put files into the working
        # directory.
        place = None if self.uri.startswith("http") else self._artifacts.as_uri()
        try:
            return str(
                self.client.create_experiment(
                    name, artifact_location=place, tags={HOME_TAG: "true"} if place else None
                )
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = self.client.get_experiment_by_name(name)  # another training was first
            if found is None:
                raise
            return str(found.experiment_id)

    @contextmanager
    def errors(self, not_found: str | None = None) -> Iterator[None]:
        """MLflow's exceptions as ours; ``not_found`` is the text for a missing entity.

        Raises:
            VersionNotFound: the entity is missing and ``not_found`` says how to say so.
            RegistryUnavailable: anything else.
        """
        try:
            yield
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST" and not_found is not None:
                raise VersionNotFound(not_found) from error
            raise RegistryUnavailable(self._describe(error)) from error
        except (sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, requests.RequestException) as error:
            raise RegistryUnavailable(
                f"the registry {self._shown_uri} cannot be used: {self._first_line(error)}"
            ) from error

    def _describe(self, error: MlflowException) -> str:
        if "database schema" in str(error):
            return (
                f"the registry {self._shown_uri} has the schema of another MLflow version; "
                "back it up, then run: mlflow db upgrade URI"
            )
        if "Current state is deleted" in str(error):
            return f"{self._first_line(error)} Restore it in MLflow, or run the command again."
        return (
            f"the registry {self._shown_uri} did not answer as expected: {self._first_line(error)}"
        )

    def _first_line(self, error: Exception) -> str:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return line.replace(self._credentials, "") if self._credentials else line

    @property
    def _credentials(self) -> str:
        """``user:password@`` of the URI, so that it can be kept out of messages."""
        authority = self.uri.partition("://")[2]
        user_info, at, _ = authority.rpartition("@")
        return user_info + at

    @property
    def _shown_uri(self) -> str:
        return self.uri.replace(self._credentials, "")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time into the body; of several that make tables, all but one fail."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network file system that cannot lock folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _relocate(database: Path, artifacts: str) -> None:
    """Replace the places of a home that has moved, or was copied, by those of today.

    MLflow has no call for it: it writes absolute places into the database, and new runs would go
    on writing to the old one.
    """
    with closing(sqlite3.connect(database, timeout=BUSY_TIMEOUT_S)) as connection, connection:
        former = connection.execute(
            "SELECT DISTINCT artifact_location FROM experiments JOIN experiment_tags"
            " USING (experiment_id) WHERE key = ? AND artifact_location != ?",
            (HOME_TAG, artifacts),
        ).fetchall()
        for (place,) in former:
            log.info(
                "the home has moved: artefacts are at %s, where they were at %s", artifacts, place
            )
            for table, column in PLACES:
                connection.execute(  # the names are constants of this module
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?)"  # noqa: S608
                    f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (artifacts, len(place) + 1, place, len(place) + 1, place + "/"),
                )
