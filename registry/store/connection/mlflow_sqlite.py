"""An MLflow registry in a SQLite file, without importing MLflow.

Importing MLflow and opening the file with it takes 3.5 s of CPU and 170 MB; a roll-back from the
shell should take less than that. MLflow does not document its tables. So this client is used only
for a file whose tables have the very revision that it knows; for any other, MLflow's own client
does the work. The methods are those of ``mlflow.MlflowClient`` that ``registry.store`` calls, with
the same names, arguments, results and changes to the tables. Source: MLflow 3.17's
``mlflow/store/model_registry/sqlalchemy_store.py``.
"""

import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from registry.store.connection.entities import (
    Page,
    RegisteredModel,
    RegisteredVersion,
    RegistryError,
)

# The revision of the tables of MLflow 3.17.
REVISION = "dc11669786a5"  # pragma: allowlist secret
BUSY_TIMEOUT_S = 20
_NAME_FILTER = re.compile(r"name = '([^']*)'")
# Without workspaces, which are a setting of MLflow, everything is in the workspace "default".
# MLflow keeps prompts as registered models; they and their versions have this tag, and MLflow's
# searches leave them out.
PROMPT_TAG = "mlflow.prompt.is_prompt"
_MODELS = """SELECT name FROM registered_models WHERE workspace = 'default' AND name NOT IN
    (SELECT name FROM registered_model_tags WHERE workspace = 'default'
     AND key = :prompt_tag AND value = 'true') ORDER BY name"""
_MODEL = """SELECT creation_time FROM registered_models
    WHERE workspace = 'default' AND name = :name"""
_MODEL_TAGS = """SELECT key, value FROM registered_model_tags
    WHERE workspace = 'default' AND name = :name"""
_ALIASES = """SELECT alias, version FROM registered_model_aliases
    WHERE workspace = 'default' AND name = :name"""
_VERSIONS = """SELECT version, creation_time, run_id, coalesce(storage_location, source)
    FROM model_versions
    WHERE workspace = 'default' AND name = :name AND version = ifnull(:version, version)
    AND current_stage != 'Deleted_Internal' ORDER BY version DESC LIMIT :limit"""
_VERSION_TAGS = """SELECT version, key, value FROM model_version_tags
    WHERE workspace = 'default' AND name = :name AND version = ifnull(:version, version)"""
# Numbers of deleted versions are not used again: MLflow keeps their rows.
_LAST_NUMBER = """SELECT ifnull(max(version), 0) FROM model_versions
    WHERE workspace = 'default' AND name = :name"""
_CREATE_MODEL = """INSERT INTO registered_models
    (name, creation_time, last_updated_time, description, workspace)
    VALUES (:name, :now, :now, :description, 'default')"""
_CREATE_VERSION = """INSERT INTO model_versions
    (name, version, creation_time, last_updated_time, description, current_stage, source, status,
     storage_location, workspace)
    VALUES (:name, :version, :now, :now, :description, 'None', :source, 'READY', :source, 'default')
"""
_CHANGED_MODEL = """UPDATE registered_models SET last_updated_time = :now
    WHERE workspace = 'default' AND name = :name"""
_SET_MODEL_TAG = """INSERT OR REPLACE INTO registered_model_tags (key, value, name, workspace)
    VALUES (:key, :value, :name, 'default')"""
_SET_VERSION_TAG = """INSERT OR REPLACE INTO model_version_tags
    (key, value, name, version, workspace) VALUES (:key, :value, :name, :version, 'default')"""
_SET_ALIAS = """INSERT OR REPLACE INTO registered_model_aliases (alias, version, name, workspace)
    VALUES (:alias, :version, :name, 'default')"""
_DELETE_ALIAS = """DELETE FROM registered_model_aliases
    WHERE workspace = 'default' AND name = :name AND alias = :alias"""

Run = Callable[..., list[tuple[Any, ...]]]
"""Runs a statement with its parameters by name, and returns the rows."""


def is_supported(database: Path, workspace: str | None) -> bool:
    """Whether this client can use ``database``: it exists, and its tables are those it knows."""
    if workspace or not database.is_file():
        return False
    try:
        with _reading(database) as run:
            return run("SELECT version_num FROM alembic_version") == [(REVISION,)]
    except sqlite3.Error:
        return False


class MlflowSqlite:
    """The registry in one file. Its methods raise ``RegistryError`` and ``sqlite3.Error``."""

    def __init__(self, database: Path) -> None:
        self._database = database

    def search_registered_models(self, *, page_token: str | None = None) -> Page[RegisteredModel]:
        """All models, on one page."""
        with _reading(self._database) as run:
            return Page([_model(run, name) for (name,) in run(_MODELS, prompt_tag=PROMPT_TAG)])

    def get_registered_model(self, name: str) -> RegisteredModel:
        """The model with its tags and aliases, all of one moment.

        Raises:
            RegistryError: ``RESOURCE_DOES_NOT_EXIST`` if the model does not exist.
        """
        with _reading(self._database) as run:
            return _model(run, name)

    def search_model_versions(
        self,
        filter_string: str,
        *,
        max_results: int = -1,
        order_by: list[str] | None = None,
        page_token: str | None = None,
    ) -> Page[RegisteredVersion]:
        """All versions of one model on one page, newest first, or the first ``max_results``.

        Args:
            filter_string: ``name = 'fashion'``; no other filter is understood.
            max_results: -1 for all.
            order_by: has no effect.
            page_token: has no effect.
        """
        named = _NAME_FILTER.fullmatch(filter_string)
        assert named is not None, filter_string
        with _reading(self._database) as run:
            found = _versions(run, named[1], limit=max_results)
        return Page([each for each in found if each.tags.get(PROMPT_TAG) != "true"])

    def get_model_version(self, name: str, version: str) -> RegisteredVersion:
        """The version with the number ``version``.

        Raises:
            RegistryError: ``RESOURCE_DOES_NOT_EXIST`` if the model or the version does not exist.
        """
        with _reading(self._database) as run:
            return _version(run, name, int(version))

    def get_model_version_download_uri(self, name: str, version: str) -> str:
        """The URI under which the version's artefacts are; raises as ``get_model_version``."""
        with _reading(self._database) as run:
            found = run(_VERSIONS, name=name, version=int(version), limit=1)
        if not found:
            raise _missing(f"{name} has no version {version}")
        return str(found[0][3])

    def create_registered_model(
        self, name: str, tags: dict[str, str], description: str | None = None
    ) -> RegisteredModel:
        """The new model, which has no version yet.

        Raises:
            RegistryError: ``RESOURCE_ALREADY_EXISTS`` if the name is taken.
        """
        with _writing(self._database) as run:
            if run(_MODEL, name=name):
                raise RegistryError(f"the name {name} is taken", "RESOURCE_ALREADY_EXISTS")
            run(_CREATE_MODEL, name=name, now=_now_ms(), description=description)
            for key, value in tags.items():
                run(_SET_MODEL_TAG, name=name, key=key, value=value)
            return _model(run, name)

    def create_model_version(
        self,
        name: str,
        source: str,
        *,
        tags: dict[str, str],
        description: str | None = None,
        await_creation_for: int = 0,
    ) -> RegisteredVersion:
        """The new version, with the next number; ``source`` is the URI of its artefacts.

        ``await_creation_for`` has no effect: the version is there at once.
        """
        with _writing(self._database) as run:
            _model(run, name)
            number, now = run(_LAST_NUMBER, name=name)[0][0] + 1, _now_ms()
            place = {"name": name, "version": number}
            run(_CREATE_VERSION, **place, now=now, source=source, description=description)
            for key, value in tags.items():
                run(_SET_VERSION_TAG, **place, key=key, value=value)
            run(_CHANGED_MODEL, name=name, now=now)
            return _version(run, name, number)

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        """Write a tag of the model; ``value`` replaces an earlier one."""
        with _writing(self._database) as run:
            _model(run, name)
            run(_SET_MODEL_TAG, name=name, key=key, value=value)

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        """Write a tag of one version; ``value`` replaces an earlier one."""
        with _writing(self._database) as run:
            _version(run, name, int(version))
            run(_SET_VERSION_TAG, name=name, version=int(version), key=key, value=value)

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        """Point ``alias`` at the number ``version``, also if it points at another one now."""
        with _writing(self._database) as run:
            _version(run, name, int(version))
            run(_SET_ALIAS, name=name, alias=alias, version=int(version))

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        """Remove ``alias`` from the model; the version at which it points stays."""
        with _writing(self._database) as run:
            run(_DELETE_ALIAS, name=name, alias=alias)


@contextmanager
def _reading(database: Path) -> Iterator[Run]:
    """Runs queries that all see the same state of ``database``."""
    with _opened(database, "BEGIN") as run:
        yield run


@contextmanager
def _writing(database: Path) -> Iterator[Run]:
    """Runs statements that other processes see all at once, or not at all after an error."""
    with _opened(database, "BEGIN IMMEDIATE") as run:
        yield run
        run("COMMIT")


@contextmanager
def _opened(database: Path, begin: str) -> Iterator[Run]:
    # Readers open the file for writing, too: the first one after a writer was killed restores it.
    uri = f"file:{quote(os.fsencode(database))}?mode=rw"
    # With ``isolation_level`` None, Python begins no transaction of its own.
    options: dict[str, Any] = {"uri": True, "timeout": BUSY_TIMEOUT_S, "isolation_level": None}
    with closing(sqlite3.connect(uri, **options)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(begin)

        def run(statement: str, **values: str | int | None) -> list[tuple[Any, ...]]:
            try:
                return list(connection.execute(statement, values))
            except (UnicodeEncodeError, OverflowError) as error:  # not of ``sqlite3.Error``
                raise RegistryError(str(error), "INVALID_PARAMETER_VALUE") from error

        yield run


def _model(run: Run, name: str) -> RegisteredModel:
    found = run(_MODEL, name=name)
    if not found:
        raise _missing(f"there is no model {name}")
    tags: dict[str, str] = dict(run(_MODEL_TAGS, name=name))
    aliases: dict[str, int] = dict(run(_ALIASES, name=name))
    return RegisteredModel(name, found[0][0], tags, aliases)


def _versions(
    run: Run, name: str, version: int | None = None, limit: int = -1
) -> list[RegisteredVersion]:
    """The versions of the model ``name``, newest first; only ``version`` if it is given."""
    tags: dict[int, dict[str, str]] = {}
    for number, key, value in run(_VERSION_TAGS, name=name, version=version):
        tags.setdefault(number, {})[key] = value
    return [
        RegisteredVersion(name, number, created, tags.get(number, {}), run_id)
        for number, created, run_id, _ in run(_VERSIONS, name=name, version=version, limit=limit)
    ]


def _version(run: Run, name: str, number: int) -> RegisteredVersion:
    found = _versions(run, name, number)
    if not found:
        raise _missing(f"{name} has no version {number}")
    return found[0]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _missing(text: str) -> RegistryError:
    return RegistryError(text, "RESOURCE_DOES_NOT_EXIST")
