"""Opens the MLflow experiment of training runs. Only training imports this module."""

import logging

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from registry.store.connection.mlflow_connection import HOME_TAG, MlflowConnection

log = logging.getLogger(__name__)


def open_experiment(connection: MlflowConnection, name: str) -> str:
    """The id of the experiment ``name``, made if there is none, restored if it was deleted.

    Makes the connection's registry the one that MLflow's own functions use.
    """
    mlflow.set_tracking_uri(connection.uri)
    with connection.errors():
        client = MlflowClient(connection.uri)
        found = client.get_experiment_by_name(name)
        if found is None:
            return _create(connection, client, name)
        if found.lifecycle_stage == "deleted":
            log.warning("the experiment %s was deleted; it is restored, with its runs", name)
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)


def _create(connection: MlflowConnection, client: MlflowClient, name: str) -> str:
    # A server chooses where artefacts go. For a database, MLflow would take the working directory.
    place = None if connection.uri.startswith("http") else connection.artifacts.as_uri()
    tags = {HOME_TAG: "true"} if place else None
    try:
        return str(client.create_experiment(name, artifact_location=place, tags=tags))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        found = client.get_experiment_by_name(name)  # another training was first
        if found is None:
            raise
        return str(found.experiment_id)
