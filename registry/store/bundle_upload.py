"""Uploads a bundle to MLflow as a model that ``mlflow.pyfunc`` can load. Imports MLflow."""

import warnings
from pathlib import Path

import mlflow
from mlflow.models import ModelSignature
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.types import ColSpec, DataType, ParamSchema, Schema
from mlflow.types.schema import Array

from registry.model.bundle import Bundle
from registry.store.connection.mlflow_connection import MlflowConnection

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, "image")]),
    outputs=Schema(
        [
            ColSpec(DataType.string, "label"),
            ColSpec(DataType.long, "index"),
            ColSpec(DataType.double, "probability"),
            ColSpec(Array(DataType.double), "probabilities"),
        ]
    ),
    params=ParamSchema([]),
)


def upload(bundle: Bundle) -> str:
    """Log ``bundle`` to the active run; returns the URI by which it can be registered."""
    assert bundle.folder.name == "bundle"  # MLflow keeps the folder's name; ``download`` expects it
    with warnings.catch_warnings():
        # The signature is given; MLflow would run an example only to guess one.
        warnings.filterwarnings("ignore", ".*input example was not provided")
        logged = mlflow.pyfunc.log_model(
            name=bundle.manifest.model,
            loader_module="registry.model.mlflow_pyfunc",
            data_path=str(bundle.folder),
            signature=SIGNATURE,
            pip_requirements=[
                f"{package}=={version}"
                for package, version in bundle.manifest.source.versions.items()
                if package != "python"
            ],
        )
    return str(logged.model_uri)


def upload_beside(source: str, folder: Path, place: str, connection: MlflowConnection) -> None:
    """Add the files of ``folder`` to the artefacts at the URI ``source``, in ``place`` there."""
    get_artifact_repository(source, tracking_uri=connection.uri).log_artifacts(str(folder), place)


def register(uri: str, name: str, tags: dict[str, str]) -> int:
    """Register what was uploaded to ``uri`` as the next version of ``name``; returns its number."""
    return int(mlflow.register_model(uri, name, tags=tags).version)
