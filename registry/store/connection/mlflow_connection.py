"""The connection to MLflow, which the registry and the tracking of training runs share.

It opens the database or server, keeps artefact places true when ``CONVOY_HOME`` has moved, and
turns MLflow's many exceptions into Convoy's. MLflow itself is imported only for a registry that our
own client cannot speak to: that takes seconds and 170 MB.
"""

import fcntl
import logging
import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

# A registry that is down must not hold its reader for minutes (MLflow's own defaults: 245 s).
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

import requests

from registry.core.errors import RegistryUnavailable, VersionNotFound
from registry.core.paths import Paths
from registry.store.connection import mlflow_rest, mlflow_sqlite
from registry.store.connection.entities import RegistryError

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


def mlflow_errors() -> tuple[type[Exception], ...]:
    """The exceptions that say that MLflow refused a call: our client's, and MLflow's own."""
    if "mlflow" not in sys.modules:
        return (RegistryError,)
    from mlflow.exceptions import MlflowException

    return RegistryError, MlflowException


def storage_errors() -> tuple[type[Exception], ...]:
    """The exceptions that say that a database or a server failed a call."""
    errors = (requests.RequestException, sqlite3.Error)
    if "sqlalchemy" not in sys.modules:
        return errors
    from sqlalchemy.exc import SQLAlchemyError

    return (*errors, SQLAlchemyError)


class MlflowConnection:
    """A client for the database or server of a home: our own where it can speak to the server."""

    def __init__(self, paths: Paths) -> None:
        self.uri = paths.tracking_uri
        self.artifacts = paths.artifacts
        with self.errors():
            self.client = self._open(paths)

    def _open(self, paths: Paths) -> mlflow_rest.MlflowRest | mlflow_sqlite.MlflowSqlite:
        """Our own client if it can speak to this registry, else MLflow's."""
        # MLflow's functions would keep the models elsewhere, so our clients must not look here.
        is_whole = os.environ.get("MLFLOW_REGISTRY_URI") in (None, "", self.uri)
        if is_whole and mlflow_rest.is_supported(self.uri):
            return mlflow_rest.MlflowRest(self.uri)
        database = Path(self.uri.removeprefix(SQLITE))
        is_file = is_whole and self.uri.startswith(SQLITE)
        if is_file and mlflow_sqlite.is_supported(database, os.environ.get("MLFLOW_WORKSPACE")):
            if database.parent == paths.root:
                _relocate(database, self.artifacts.as_uri())
            return mlflow_sqlite.MlflowSqlite(database)
        # The methods that Convoy calls are the same, so MLflow's client has the type of ours.
        client: mlflow_sqlite.MlflowSqlite = self._open_mlflow(paths)
        return client

    def _open_mlflow(self, paths: Paths) -> Any:
        """MLflow's own client, which makes the tables if there are none."""
        import mlflow

        mlflow.set_tracking_uri(self.uri)
        if not self.uri.startswith(SQLITE):
            return mlflow.MlflowClient(self.uri)
        database = Path(self.uri.removeprefix(SQLITE))
        database.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(database.parent):
            client = mlflow.MlflowClient(self.uri)
            # Now, while no other process makes the same tables.
            client.search_registered_models(max_results=1)
            if database.parent == paths.root:
                _relocate(database, self.artifacts.as_uri())
        return client

    @contextmanager
    def errors(self, not_found: str | None = None) -> Iterator[None]:
        """MLflow's exceptions as ours; ``not_found`` is the text for a missing entity.

        Raises:
            VersionNotFound: the entity is missing and ``not_found`` says how to say so.
            RegistryUnavailable: anything else.
        """
        try:
            yield
        except mlflow_errors() as error:
            if (
                getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"
                and not_found is not None
            ):
                raise VersionNotFound(not_found) from error
            raise RegistryUnavailable(self._describe(error)) from error
        except storage_errors() as error:
            raise RegistryUnavailable(
                f"the registry {self._shown_uri} cannot be used: {self.first_line(error)}"
            ) from error

    def _describe(self, error: Exception) -> str:
        if "database schema" in str(error):
            return (
                f"the registry {self._shown_uri} has the schema of another MLflow version; "
                "back it up, then run: mlflow db upgrade URI"
            )
        if "Current state is deleted" in str(error):
            return f"{self.first_line(error)} Restore it in MLflow, or run the command again."
        return (
            f"the registry {self._shown_uri} did not answer as expected: {self.first_line(error)}"
        )

    def first_line(self, error: Exception) -> str:
        """The first line of ``error``'s text, without the credentials of the URI."""
        return self._lines(error)[0]

    def last_line(self, error: Exception) -> str:
        """The last line, where MLflow's downloads have the reason; else as ``first_line``."""
        return self._lines(error)[-1]

    def _lines(self, error: Exception) -> list[str]:
        text = str(error).strip() or type(error).__name__
        return (text.replace(self._credentials, "") if self._credentials else text).splitlines()

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
    with (
        closing(sqlite3.connect(database, timeout=mlflow_sqlite.BUSY_TIMEOUT_S)) as connection,
        connection,
    ):
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
