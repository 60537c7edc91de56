"""``ForeignModels``: versions that MLflow's own ``log_model`` made. Convoy can import them.

Reads what they are without MLflow. Fetching one imports MLflow, which takes seconds.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from registry.core.errors import BundleInvalid, RegistryUnavailable, UsageError
from registry.model.refs import ForeignVersion
from registry.store.connection.artifacts import Artifacts
from registry.store.connection.mlflow_connection import MlflowConnection
from registry.store.connection.pages import all_pages
from registry.store.model_names import AUDIT_LOG, DIGEST_TAG

MLMODEL = "MLmodel"
MAX_MLMODEL_BYTES = 1_000_000
# Flavours that others are wrapped in.
WRAPPER = "python_function"
_PLAIN_NAME = re.compile("[^'\"\\\\/]+")


class ForeignModels:
    """The versions of one registry that Convoy did not publish."""

    def __init__(self, connection: MlflowConnection) -> None:
        self._connection = connection
        self._client = connection.client
        self._artifacts = Artifacts(connection)

    def newest(self) -> Iterator[ForeignVersion]:
        """The newest version of each model, if Convoy did not publish it."""
        with self._connection.errors():
            models = all_pages(self._client.search_registered_models)
        for name in sorted(model.name for model in models if not model.name.endswith(AUDIT_LOG)):
            yield from self.versions(name)[:1]

    def versions(self, name: str) -> list[ForeignVersion]:
        """Those versions of ``name`` that Convoy did not publish, newest first."""
        if not _PLAIN_NAME.fullmatch(name):
            return []
        with self._connection.errors():
            found = all_pages(self._client.search_model_versions, f"name = '{name}'")
        numbers = [int(each.version) for each in found if DIGEST_TAG not in each.tags]
        return [self.describe(name, number) for number in sorted(numbers, reverse=True)]

    def describe(self, name: str, number: int) -> ForeignVersion:
        """The version with its flavours; they are empty if its record cannot be read.

        Raises:
            VersionNotFound: there is no such version.
        """
        with self._connection.errors(f"{name} has no version {number}"):
            source = self._client.get_model_version_download_uri(name, str(number))
        try:
            with tempfile.TemporaryDirectory(prefix="convoy-mlmodel-") as folder:
                self._artifacts.fetch(source, MLMODEL, Path(folder), MAX_MLMODEL_BYTES)
                record = yaml.safe_load(Path(folder, MLMODEL).read_bytes())
            flavours = [str(each) for each in record["flavors"]]
        except (BundleInvalid, RegistryUnavailable, yaml.YAMLError, KeyError, TypeError) as error:
            return ForeignVersion(name=name, version=number, why=f"unreadable: {error}")
        return ForeignVersion(
            name=name,
            version=number,
            why="MLflow logged it, without Convoy",
            flavours=tuple(sorted(flavours, key=lambda each: (each == WRAPPER, each))),
        )

    def fetch(self, version: ForeignVersion, folder: Path) -> Path:
        """Fetch all files of ``version`` below ``folder``; returns the folder with ``MLmodel``.

        Raises:
            RegistryUnavailable: they could not be fetched.
        """
        import mlflow

        mlflow.set_tracking_uri(self._connection.uri)
        uri = f"models:/{version.name}/{version.version}"
        with self._connection.errors():
            return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))


def onnx_file(folder: Path) -> Path:
    """The graph of a fetched version of the flavour onnx.

    Raises:
        UsageError: its record names no file in the folder.
    """
    record = yaml.safe_load((folder / MLMODEL).read_bytes())
    file = folder / str(record["flavors"]["onnx"].get("data", ""))
    if not file.is_file() or folder.resolve() not in file.resolve().parents:
        raise UsageError(f"{MLMODEL} names the graph {str(file.name)!r}, which is not there")
    return file
