"""``ModelStore``: versions, aliases and files in an MLflow registry.

MLflow's loose types stop here, its exceptions in ``registry.store.mlflow_connection``. MLflow
itself is imported only where it is needed: to publish, for a registry that is a database, and for
artefacts that the MLflow server does not serve. That takes seconds and 170 MB.
"""

import logging
import re
import tempfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import msgspec

from registry.core.errors import (
    BundleInvalid,
    RegistryUnavailable,
    VersionNotFound,
)
from registry.core.names import MODEL_NAME
from registry.core.paths import Paths
from registry.model.bundle import MANIFEST, Bundle, open_bundle
from registry.model.manifest import Manifest
from registry.model.refs import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    Canary,
    ForeignVersion,
    ModelRef,
    ModelVersion,
)
from registry.store.artifacts import Artifacts
from registry.store.audit_log import AuditLog, Entry
from registry.store.mlflow_connection import MlflowConnection, mlflow_errors, storage_errors
from registry.store.model_names import AUDIT_LOG, ModelNames

log = logging.getLogger(__name__)

DIGEST_TAG = "convoy.manifest_sha256"
# Where MLflow puts the folder that ``bundle_upload`` gives it.
BUNDLE_PATH = "data/bundle"
ENTRY_TAG, NEWEST_TAG = "convoy.entry", "convoy.newest_line"
CANARY_TAG = "convoy.canary"
SIGNATURE_TAG = "convoy.signature"
# What the databases take for a number: 32 bits.
MAX_VERSION_NUMBER = 2**31 - 1
APPEND_TRIES = 20
# That of a model with 10,000 classes is about 1 MB long.
MAX_MANIFEST_BYTES = 16 * 1024 * 1024


class ModelStore:
    """An MLflow registry: a database or server, and a place for artefacts."""

    def __init__(self, paths: Paths) -> None:
        self._connection = MlflowConnection(paths)
        self._client = self._connection.client
        self._names = ModelNames(self._connection)
        self._artifacts = Artifacts(self._connection)
        self.uri = self._connection.uri
        self._decided = paths.decided

    def experiment(self, name: str) -> str:
        """The id of the experiment ``name``, made if there is none, restored if it was deleted."""
        from registry.store.experiments import open_experiment

        return open_experiment(self._connection, name)

    def errors(self, not_found: str | None = None) -> AbstractContextManager[None]:
        """MLflow's exceptions as ours; see ``MlflowConnection.errors``."""
        return self._connection.errors(not_found)

    def publish(self, bundle: Bundle, tags: dict[str, str]) -> ModelVersion:
        """Log ``bundle`` to the active run, register it as the next version, call it challenger.

        The first version of a name makes the model's log, too.

        Raises:
            RegistryUnavailable: the registry did not take it.
            PromotionRefused: as ``check_name``.
        """
        from registry.store.bundle_upload import register, upload

        name = bundle.manifest.model
        self.check_name(name)  # before the upload, which may take long
        with self.errors():
            uri = upload(bundle)
            self._names.claim(name)
            version = register(uri, name, {DIGEST_TAG: bundle.manifest_sha256, **tags})
            self._set_alias(name, {}, CHALLENGER, version)
        return self.resolve(ModelRef(name, version))

    def check_name(self, name: str) -> None:
        """Refuse a name under which no version can be published; see ``ModelNames.check``."""
        self._names.check(name)

    def check_log(self, name: str) -> None:
        """Refuse to follow a log that publishing did not make; see ``ModelNames.check_log``."""
        self._names.check_log(name)

    def models(self) -> list[str]:
        """Names of all registered models that could be Convoy's, in alphabetical order."""
        with self.errors():
            found = _all_pages(self._client.search_registered_models)
        return sorted(model.name for model in found if MODEL_NAME.fullmatch(model.name))

    def versions(self, name: str) -> list[tuple[ModelVersion, dict[str, str]]]:
        """Every version of ``name`` that Convoy published, with its tags, newest first.

        Raises:
            VersionNotFound: no model of that name.
        """
        aliases = self.aliases(name)
        with self.errors():
            found = _all_pages(self._client.search_model_versions, f"name = '{name}'")
        rows = [
            (self._model_version(entity, aliases), dict(entity.tags))
            for entity in found
            if DIGEST_TAG in entity.tags
        ]
        return sorted(rows, key=lambda row: -row[0].version)

    def aliases(self, name: str) -> dict[str, int]:
        """Alias → version number."""
        return self.aliases_and_canary(name)[0]

    def aliases_and_canary(self, name: str) -> tuple[dict[str, int], Canary | None]:
        """Alias → version number, and the canary, both read at one moment."""
        with self.errors(f"there is no model {name!r} in the registry"):
            model = self._client.get_registered_model(name)
        aliases = {alias: int(version) for alias, version in model.aliases.items()}
        said = model.tags.get(CANARY_TAG)
        try:
            return aliases, msgspec.json.decode(said, type=Canary) if said else None
        except (msgspec.MsgspecError, ValueError) as error:
            log.warning("%s: the tag %s is ignored: %s", name, CANARY_TAG, error)
            return aliases, None

    def resolve(self, ref: ModelRef) -> ModelVersion:
        """The version that ``ref`` means now.

        Raises:
            VersionNotFound: no such model, version or alias.
            RegistryUnavailable: the registry could not be asked.
        """
        return self.resolve_in(self.aliases(ref.name), ref)

    def resolve_in(self, aliases: dict[str, int], ref: ModelRef) -> ModelVersion:
        """As ``resolve``, by ``aliases`` that were read before."""
        number = aliases.get(ref.alias) if ref.alias is not None else ref.version
        if number is None:
            known = ", ".join(sorted(aliases)) or "none"
            raise VersionNotFound(
                f"{ref.name} has no alias {ref.alias!r}; its aliases are: {known}"
            )
        missing = f"{ref.name} has no version {number}"
        if number > MAX_VERSION_NUMBER:
            raise VersionNotFound(missing)
        with self.errors(missing):
            entity = self._client.get_model_version(ref.name, str(number))
        return self._model_version(entity, aliases)

    def champion_and_candidate(
        self, name: str, version: int
    ) -> tuple[ModelVersion | ForeignVersion | None, ModelVersion]:
        """The champion, as ``champion`` gives it, and ``version`` beside it."""
        aliases = self.aliases(name)
        challenger = self.resolve_in(aliases, ModelRef(name, version))
        return self.champion(name, aliases.get(CHAMPION)), challenger

    def champion(self, name: str, number: int | None) -> ModelVersion | ForeignVersion | None:
        """The version that a challenger is compared with; None when it was deleted."""
        if number is None:
            return None
        try:
            return self.resolve(ModelRef(name, number))
        except VersionNotFound:
            return None
        except BundleInvalid as error:
            return ForeignVersion(name=name, version=number, why=str(error))

    def find(self, name: str, number: int | None) -> ModelVersion | None:
        """The version; None when it was deleted, or Convoy did not publish it."""
        found = self.champion(name, number)
        return found if isinstance(found, ModelVersion) else None

    def manifest(self, version: ModelVersion) -> Manifest:
        """The record inside its bundle; raises as ``download`` does."""
        with tempfile.TemporaryDirectory(prefix="convoy-manifest-") as folder:
            return self.download(version, Path(folder), lambda _: ()).manifest

    def download(
        self,
        version: ModelVersion,
        folder: Path,
        wanted: Callable[[Bundle], Iterable[str]] = lambda bundle: bundle.manifest.files,
    ) -> Bundle:
        """Fetch the manifest and the ``wanted`` files of a version into ``folder``, verified.

        MLflow's downloads carry no checksums, so only the bundle's digests show that a file is
        complete. The manifest's digest comes from the registry's database. At most
        ``MAX_MANIFEST_BYTES`` of a manifest are fetched, and of any other file the manifest's size.

        Raises:
            BundleInvalid: something that came is not what was published, or the manifest does not
                name a wanted file.
        """
        with self.errors():
            source = self._client.get_model_version_download_uri(version.name, str(version.version))
        folder.mkdir(parents=True, exist_ok=True)
        self._artifacts.fetch(f"{source}/{BUNDLE_PATH}/{MANIFEST}", folder, MAX_MANIFEST_BYTES)
        bundle = open_bundle(folder, version.manifest_sha256)
        names = list(wanted(bundle))
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            size_bytes = bundle.entry(name).size_bytes
            self._artifacts.fetch(f"{source}/{BUNDLE_PATH}/{name}", target.parent, size_bytes)
        bundle.verify(names)
        return bundle

    def set_aliases(
        self,
        name: str,
        *,
        champion: int | None,
        previous: int | None,
        canary: Canary | None = None,
    ) -> None:
        """Point the aliases ``champion`` and ``previous`` at these versions; None leaves one as is.

        Also sets the tag of the ``canary``. ``previous`` moves first: a crash in between leaves the
        old champion serving. A new champion loses the alias ``challenger``.
        """
        aliases, present = self.aliases_and_canary(name)
        if canary != present:
            with self.errors():
                said = msgspec.json.encode(canary).decode() if canary else ""
                self._client.set_registered_model_tag(name, CANARY_TAG, said)
        with suppress(VersionNotFound):  # the previous champion may have been deleted since
            self._set_alias(name, aliases, PREVIOUS, previous)
        self._set_alias(name, aliases, CHAMPION, champion)
        if champion is not None and self.aliases(name).get(CHALLENGER) == champion:
            self._end_challenge(name, champion, previous)
        with suppress(OSError):  # without this file, the puller polls within seconds
            self._decided.touch()

    def _end_challenge(self, name: str, champion: int, previous: int | None) -> None:
        """Delete the alias ``challenger``, and give it to a version that is published meanwhile.

        MLflow deletes an alias without comparing. A version that was published just before lost its
        alias by this: the newest version gets it again, unless that is the ``previous`` champion.
        """
        with self.errors():
            self._client.delete_registered_model_alias(name, CHALLENGER)
        newest = champion
        while (published := self._newest(name)) > newest:
            newest, aliases = published, self.aliases(name)
            if newest != previous and aliases.get(CHALLENGER, 0) < newest:
                with suppress(VersionNotFound):  # it was deleted since
                    self._set_alias(name, aliases, CHALLENGER, newest)

    def _newest(self, name: str) -> int:
        """The highest number of a version of ``name``; 0 when Convoy did not publish that."""
        with self.errors():
            found = self._client.search_model_versions(
                f"name = '{name}'", max_results=1, order_by=["version_number DESC"]
            )
        return next((int(entity.version) for entity in found if DIGEST_TAG in entity.tags), 0)

    def sign(self, version: ModelVersion, envelope: str) -> None:
        """Keep the ``envelope`` of a signature with the version, instead of an earlier one."""
        with self.errors():
            self._client.set_model_version_tag(
                version.name, str(version.version), SIGNATURE_TAG, envelope
            )

    def append(self, name: str, entry: Entry) -> None:
        """Write ``entry`` at the end of the audit log of ``name``.

        The log is a registered model of its own, and its versions are the lines: an MLflow registry
        numbers versions correctly when several writers add some at once. The log is backed up with
        the registry, and MLflow's pages show it.
        """
        data = entry.to_json()
        audit_log = f"{name}{AUDIT_LOG}"
        tags = {ENTRY_TAG: data.decode()}
        # MLflow requires a source. It would look up a ``models:/`` source, and fail if that version
        # was deleted.
        source = f"convoy:/{name}/{entry.to_version}"  # servers want an absolute path
        about = f"{entry.action} {entry.to_version}: {entry.reason or entry.details or ''}"[:1000]
        with self.errors():
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

    def audit_log(self, name: str) -> AuditLog:
        """Every decision about ``name``; empty before the first."""
        with self.errors():
            found = _all_pages(self._client.search_model_versions, f"name = '{name}{AUDIT_LOG}'")
        return AuditLog(
            (int(line.version), line.tags.get(ENTRY_TAG, "").encode()) for line in found
        )

    def newest_line(self, name: str) -> int | None:
        """The number of the log's newest line, as ``note_newest`` stored it."""
        log_model = self._names.registered(f"{name}{AUDIT_LOG}")
        number = log_model.tags.get(NEWEST_TAG, "") if log_model else ""
        return int(number) if number.isdecimal() else None

    def note_newest(self, name: str, audit_log: AuditLog) -> None:
        """Store the number of the newest line, so that ``audit`` notices missing last lines."""
        with self.errors():
            self._client.set_registered_model_tag(
                f"{name}{AUDIT_LOG}", NEWEST_TAG, str(audit_log.last)
            )

    def _set_alias(
        self, name: str, aliases: dict[str, int], alias: str, version: int | None
    ) -> None:
        if version is not None and aliases.get(alias) != version:
            with self.errors(f"{name} has no version {version}"):
                self._client.get_model_version(name, str(version))
                try:
                    self._client.set_registered_model_alias(name, alias, str(version))
                except mlflow_errors() + storage_errors() as error:
                    # When two callers make an alias at once, MLflow fails one of them. The alias
                    # exists then, and can be moved.
                    if not any(sign in str(error) for sign in ("UNIQUE", "duplicate key")):
                        raise
                    self._client.set_registered_model_alias(name, alias, str(version))

    def _model_version(self, entity: Any, aliases: dict[str, int]) -> ModelVersion:
        number = int(entity.version)  # an int from a database, a str over REST
        digest = entity.tags.get(DIGEST_TAG)
        if digest is None or not re.fullmatch("[0-9a-f]{64}", digest):
            raise BundleInvalid(
                f"{entity.name} version {number} was not published by Convoy: "
                f"its tag {DIGEST_TAG} is {digest!r}"
            )
        return ModelVersion(
            name=entity.name,
            version=number,
            manifest_sha256=digest,
            aliases=tuple(sorted(alias for alias, n in aliases.items() if n == number)),
            run_id=entity.run_id,
            created_unix_s=entity.creation_timestamp / 1000,
            signature=entity.tags.get(SIGNATURE_TAG),
        )


def _all_pages(search: Callable[..., Any], *arguments: str) -> list[Any]:
    """Everything that one of MLflow's searches finds, page by page."""
    found: list[Any] = []
    token: str | None = None  # of the next page
    while token != "":  # nosec B105
        page = search(*arguments, page_token=token)
        found += page
        token = page.token or ""
    return found
