"""``AuditLogStore``: where audit logs are kept.

The log of a model is a registered model of its own, and its versions are the lines: an MLflow
registry numbers versions correctly when several writers add some at once. The log is backed up with
the registry, and MLflow's pages show it.
"""

from registry.core.errors import RegistryUnavailable
from registry.store.audit_log import AuditLog, Entry
from registry.store.connection.mlflow_connection import MlflowConnection, mlflow_errors
from registry.store.connection.pages import all_pages
from registry.store.model_names import AUDIT_LOG, ModelNames

ENTRY_TAG, NEWEST_TAG = "convoy.entry", "convoy.newest_line"
APPEND_TRIES = 20


class AuditLogStore:
    """The audit logs of all models in one registry."""

    def __init__(self, connection: MlflowConnection, names: ModelNames) -> None:
        self._client = connection.client
        self._errors = connection.errors
        self._names = names

    def read(self, name: str) -> AuditLog:
        """Every decision about ``name``; empty before the first."""
        with self._errors():
            found = all_pages(self._client.search_model_versions, f"name = '{name}{AUDIT_LOG}'")
        return AuditLog(
            (int(line.version), line.tags.get(ENTRY_TAG, "").encode()) for line in found
        )

    def append(self, name: str, entry: Entry) -> None:
        """Write ``entry`` at the end of the audit log of ``name``."""
        data = entry.to_json()
        audit_log = f"{name}{AUDIT_LOG}"
        tags = {ENTRY_TAG: data.decode()}
        # MLflow requires a source. It would look up a ``models:/`` source, and fail if that version
        # was deleted.
        source = f"convoy:/{name}/{entry.to_version}"  # servers want an absolute path
        about = f"{entry.action} {entry.to_version}: {entry.reason or entry.details or ''}"[:1000]
        with self._errors():
            for _ in range(APPEND_TRIES):
                try:
                    self._client.create_model_version(
                        audit_log, source, tags=tags, description=about, await_creation_for=0
                    )
                    return
                except mlflow_errors() as error:
                    if "Giving up after" not in str(error):  # MLflow lost the race three times
                        raise
        raise RegistryUnavailable(f"{audit_log}: no line could be written; try again")

    def newest_line(self, name: str) -> int | None:
        """The number of the log's newest line, as ``note_newest`` stored it."""
        log_model = self._names.registered(f"{name}{AUDIT_LOG}")
        number = log_model.tags.get(NEWEST_TAG, "") if log_model else ""
        return int(number) if number.isdecimal() else None

    def note_newest(self, name: str, audit_log: AuditLog) -> None:
        """Store the number of the newest line, so that ``audit`` notices missing last lines."""
        with self._errors():
            self._client.set_registered_model_tag(
                f"{name}{AUDIT_LOG}", NEWEST_TAG, str(audit_log.last)
            )
