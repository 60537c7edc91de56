"""``Evaluations``: held-out records that versions got after they were published.

A record lies beside the version's bundle. The tag ``convoy.evaluation`` of the version has its
digest, so that only the record that was written last counts.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from registry.core.errors import BundleInvalid
from registry.core.names import sha256_hex
from registry.model.bundle import read_digested
from registry.model.manifest import LaterEvaluation
from registry.model.refs import ModelVersion
from registry.store.connection.artifacts import Artifacts
from registry.store.connection.mlflow_connection import MlflowConnection

EVALUATION_TAG = "convoy.evaluation"
RECORD = "evaluation.json"
MAX_RECORD_BYTES = 1_000_000
# Of the digest, in the name of the folder.
DIGITS = 16


class Evaluations:
    """The later evaluations in one registry."""

    def __init__(self, connection: MlflowConnection) -> None:
        self._connection = connection
        self._client = connection.client
        self._artifacts = Artifacts(connection)

    def attach(
        self, version: ModelVersion, evaluation: LaterEvaluation, files: Mapping[str, bytes]
    ) -> None:
        """Keep ``evaluation`` and its ``files`` with ``version``, instead of an earlier one.

        Imports MLflow, which takes seconds.

        Raises:
            RegistryUnavailable: the registry did not take it.
        """
        from registry.store.bundle_upload import upload_beside

        record = msgspec.json.encode(evaluation)
        digest = sha256_hex(record)
        with tempfile.TemporaryDirectory(prefix="convoy-evaluation-") as name:
            for file, data in {**files, RECORD: record}.items():
                Path(name, file).write_bytes(data)
            with self._connection.errors():
                upload_beside(self._source(version), Path(name), _place(digest), self._connection)
                self._client.set_model_version_tag(
                    version.name, str(version.version), EVALUATION_TAG, digest
                )

    def read(self, version: ModelVersion, folder: Path) -> LaterEvaluation | None:
        """The evaluation of ``version``, fetched into ``folder``; None if it has none.

        Raises:
            BundleInvalid: the record is missing, damaged, or of another version.
        """
        return self._fetch(version, folder, lambda _: ())

    def fetch(self, version: ModelVersion, folder: Path) -> LaterEvaluation | None:
        """As ``read``, with the evaluation's files, verified."""
        return self._fetch(version, folder, lambda found: found.files)

    def _fetch(
        self,
        version: ModelVersion,
        folder: Path,
        wanted: Callable[[LaterEvaluation], Iterable[str]],
    ) -> LaterEvaluation | None:
        digest = version.evaluation_sha256
        if digest is None:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        source, place = self._source(version), _place(digest)
        self._artifacts.fetch(source, f"{place}/{RECORD}", folder, MAX_RECORD_BYTES)
        record = read_digested(folder / RECORD, digest)
        try:
            found = msgspec.json.decode(record, type=LaterEvaluation)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise BundleInvalid(f"the evaluation of {version.name} is damaged: {error}") from error
        if found.manifest_sha256 != version.manifest_sha256:
            raise BundleInvalid(f"the evaluation of {version.name} is of another version")
        for name in wanted(found):
            entry = found.files[name]
            self._artifacts.fetch(source, f"{place}/{name}", folder, entry.size_bytes)
            read_digested(folder / name, entry.sha256)
        return found

    def _source(self, version: ModelVersion) -> str:
        with self._connection.errors():
            source: str = self._client.get_model_version_download_uri(
                version.name, str(version.version)
            )
        return source


def _place(digest: str) -> str:
    return f"evaluations/{digest[:DIGITS]}"
