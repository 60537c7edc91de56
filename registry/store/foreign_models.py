"""``ForeignModels``: versions that MLflow's own ``log_model`` made. Convoy can import them.

Reads what they are without MLflow. Fetching one imports MLflow, which takes seconds.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from registry.core.errors import BundleInvalid, RegistryUnavailable, UsageError
from registry.model.refs import ForeignVersion
from registry.store.connection.artifacts import Artifacts
from registry.store.connection.mlflow_connection import MlflowConnection
from registry.store.connection.pages import all_pages
from registry.store.model_names import AUDIT_LOG, DIGEST_TAG

MLMODEL = "MLmodel"
MAX_MLMODEL_BYTES = 100_000
# Of all files of a version. A graph may have a gigabyte; torch writes its weights once more.
MAX_FETCHED_BYTES = 4_000_000_000
MAX_FETCHED_FILES = 1_000
# Flavours that others are wrapped in.
WRAPPER = "python_function"
_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
_PLAIN_NAME = re.compile("[^'\"\\\\/]+")


class ForeignModels:
    """The versions of one registry that Convoy did not publish."""

    def __init__(self, connection: MlflowConnection) -> None:
        self._connection = connection
        self._client = connection.client
        self._artifacts = Artifacts(connection)

    def newest(self) -> Iterator[ForeignVersion]:
        """The newest of each model's versions that Convoy did not publish."""
        with self._connection.errors():
            models = all_pages(self._client.search_registered_models)
        for name in sorted(model.name for model in models if not model.name.endswith(AUDIT_LOG)):
            yield from (self.describe(name, number) for number in self._numbers(name)[:1])

    def versions(self, name: str) -> list[ForeignVersion]:
        """Those versions of ``name`` that Convoy did not publish, newest first."""
        return [self.describe(name, number) for number in self._numbers(name)]

    def _numbers(self, name: str) -> list[int]:
        """The numbers of those versions, newest first."""
        if not _PLAIN_NAME.fullmatch(name):
            return []
        with self._connection.errors():
            found = all_pages(self._client.search_model_versions, f"name = '{name}'")
        numbers = [int(each.version) for each in found if DIGEST_TAG not in each.tags]
        return sorted(numbers, reverse=True)

    def describe(self, name: str, number: int) -> ForeignVersion:
        """The version with its flavours; they are empty if its record cannot be read.

        Raises:
            VersionNotFound: the registry has no version of that number.
        """
        with self._connection.errors(f"{name} has no version {number}"):
            source = self._client.get_model_version_download_uri(name, str(number))
        try:
            with tempfile.TemporaryDirectory(prefix="convoy-mlmodel-") as folder:
                self._artifacts.fetch(source, MLMODEL, Path(folder), MAX_MLMODEL_BYTES)
                record = yaml.safe_load(Path(folder, MLMODEL).read_bytes())
            flavours = [each for each in _flavours(record) if isinstance(each, str)]
        except (BundleInvalid, RegistryUnavailable, *_UNREADABLE) as error:
            return ForeignVersion(name=name, version=number, why=f"unreadable: {str(error)[:200]}")
        return ForeignVersion(
            name=name,
            version=number,
            why="MLflow logged it, without Convoy",
            flavours=tuple(sorted(flavours, key=lambda each: (each == WRAPPER, each))),
        )

    def fetch(self, version: ForeignVersion, folder: Path) -> Path:
        """Fetch all files of ``version`` below ``folder``; returns the folder with ``MLmodel``.

        Raises:
            UsageError: they have more bytes than an import takes.
            RegistryUnavailable: they could not be fetched.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        with self._connection.errors():
            source = self._client.get_model_version_download_uri(version.name, str(version.version))
            repository = get_artifact_repository(source, tracking_uri=self._connection.uri)
            _check_size(repository)
            return Path(repository.download_artifacts("", dst_path=str(folder)))


def onnx_file(folder: Path) -> Path:
    """The graph of a fetched version of the flavour onnx.

    Raises:
        UsageError: its record names no file in the folder.
    """
    try:
        flavour = _flavours(yaml.safe_load((folder / MLMODEL).read_bytes())).get("onnx")
    except _UNREADABLE as error:
        raise UsageError(f"{MLMODEL} cannot be read: {str(error)[:200]}") from error
    data = flavour.get("data") if isinstance(flavour, dict) else None
    file = folder / (data if isinstance(data, str) else "")
    if not file.is_file() or folder.resolve() not in file.resolve().parents:
        raise UsageError(f"{MLMODEL} names the graph {str(file.name)!r}, which is not there")
    return file


def _flavours(record: Any) -> dict[Any, Any]:
    """The flavours in MLflow's record; ``ValueError`` if it has none."""
    flavours = record.get("flavors") if isinstance(record, dict) else None
    if not isinstance(flavours, dict):
        raise ValueError("it names no flavours")
    return flavours


def _check_size(repository: Any) -> None:
    """Refuse to fetch more than an import takes, as far as the storage tells sizes."""
    folders: list[str | None] = [None]
    files, size_bytes = 0, 0
    while folders:
        for each in repository.list_artifacts(folders.pop()):
            files += 1
            size_bytes += each.file_size or 0
            if each.is_dir:
                folders.append(each.path)
        if files > MAX_FETCHED_FILES or size_bytes > MAX_FETCHED_BYTES:
            raise UsageError(
                f"the version has {files:,} files or more, of {size_bytes:,} bytes; at most "
                f"{MAX_FETCHED_FILES:,} files of {MAX_FETCHED_BYTES:,} bytes are imported"
            )
