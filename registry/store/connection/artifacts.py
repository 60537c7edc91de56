"""Fetches files of a version from wherever MLflow keeps its artefacts, with a limit of bytes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests

from registry.core.errors import BundleInvalid, RegistryUnavailable
from registry.store.connection.mlflow_connection import MlflowConnection, mlflow_errors
from registry.store.connection.mlflow_rest import MlflowRest

BLOCK_BYTES = 64 * 1024
# A place of artefacts that the tracking server serves itself, under the path that follows.
SERVED = "mlflow-artifacts:/"
# MLflow says "missing" in a different way for each kind of artefact storage.
MISSING = ("No such artifact", "404 Client Error", "404 GET", "(404)", "NoSuchKey")


class Artifacts:
    """The artefacts of one registry."""

    def __init__(self, connection: MlflowConnection) -> None:
        self._connection = connection

    def fetch(self, source: str, name: str, folder: Path, max_bytes: int) -> None:
        """Fetch the file ``name`` of the artefacts at the URI ``source`` into ``folder``.

        Raises:
            BundleInvalid: it is missing, or larger than ``max_bytes``.
            RegistryUnavailable: it could not be fetched.
        """
        uri = f"{source}/{name}"
        with self._connection.errors():
            try:
                self._fetch(source, name, folder / Path(name).name, max_bytes)
            except _fetch_errors() as error:
                if isinstance(error, FileNotFoundError | NotADirectoryError) or any(
                    sign in str(error) for sign in MISSING
                ):
                    raise BundleInvalid(f"{uri} is missing from the artefacts") from error
                reason = self._connection.last_line(error)
                raise RegistryUnavailable(f"{uri} could not be fetched: {reason}") from error

    def _fetch(self, place: str, name: str, target: Path, max_bytes: int) -> None:
        client, uri = self._connection.client, f"{place}/{name}"
        if isinstance(client, MlflowRest) and uri.startswith(SERVED) and "://" not in uri:
            response = client.open_artifact(uri.removeprefix(SERVED))
            with response:
                response.raise_for_status()
                _write(response.iter_content(BLOCK_BYTES), uri, target, max_bytes)
            return
        if uri.startswith("file:"):
            # ``name`` is not part of the URL: "%2e%2e" in it must not become "..".
            source = Path(url2pathname(urlsplit(place).path)) / name
            if source.exists() and not source.is_file():  # MLflow would copy a folder
                raise BundleInvalid(f"{uri} is not a file")
            if (size_bytes := source.stat().st_size) > max_bytes:
                raise _too_long(uri, f"{size_bytes:,} bytes long", max_bytes)
            with source.open("rb") as file:
                _write(iter(lambda: file.read(BLOCK_BYTES), b""), uri, target, max_bytes)
            return
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
        from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        root = uri.rpartition("/")[0]
        repository = get_artifact_repository(root, tracking_uri=self._connection.uri)
        if isinstance(repository, HttpArtifactRepository):
            credentials = get_default_host_creds(repository.artifact_uri)
            # A compressed answer would be counted after it was unpacked.
            plain = {"Accept-Encoding": "identity"}
            with http_request(
                credentials, f"/{target.name}", "GET", stream=True, extra_headers=plain
            ) as answer:
                answer.raise_for_status()
                _write(answer.iter_content(BLOCK_BYTES), uri, target, max_bytes)
        else:
            _check_size(repository, uri, target.name, max_bytes)
            repository.download_artifacts(target.name, str(target.parent))


def _fetch_errors() -> tuple[type[Exception], ...]:
    return (*mlflow_errors(), requests.HTTPError, OSError)


def _check_size(repository: Any, uri: str, name: str, max_bytes: int) -> None:
    """Raise ``BundleInvalid`` unless the file ``name`` has at most ``max_bytes``, as it is listed.

    A folder has no size, and MLflow would download all that lies in it.
    """
    for listed in repository.list_artifacts():
        size_bytes = listed.file_size
        if Path(listed.path).name == name and (size_bytes is None or size_bytes > max_bytes):
            what = "of unknown size" if size_bytes is None else f"{size_bytes:,} bytes long"
            raise _too_long(uri, what, max_bytes)


def _write(blocks: Iterable[bytes], uri: str, target: Path, max_bytes: int) -> None:
    """Write what a server sends to ``target``; ``BundleInvalid`` once it has sent too much.

    A server may list any size and send another, so the bytes are counted as they come.
    """
    received = 0
    with target.open("wb") as file:
        for block in blocks:
            received += len(block)
            if received > max_bytes:
                raise _too_long(uri, "longer", max_bytes)
            file.write(block)


def _too_long(uri: str, what: str, max_bytes: int) -> BundleInvalid:
    return BundleInvalid(f"{uri} is {what}; at most {max_bytes:,} bytes are fetched")
