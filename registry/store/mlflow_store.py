"""``ModelStore``: versions, aliases and files in an MLflow registry.

MLflow's loose types stop here, its exceptions in ``registry.store.connection``. MLflow itself takes
seconds and 170 MB: it is imported only to publish, and where our own clients cannot be used.
"""

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from registry.core.errors import BundleInvalid, VersionNotFound
from registry.core.names import MODEL_NAME
from registry.core.paths import Paths
from registry.model.bundle import MANIFEST, Bundle, open_bundle
from registry.model.manifest import Manifest
from registry.model.refs import CHAMPION, ForeignVersion, ModelRef, ModelVersion
from registry.store.aliases import Aliases
from registry.store.audit_log_store import AuditLogStore
from registry.store.connection.artifacts import Artifacts
from registry.store.connection.mlflow_connection import MlflowConnection
from registry.store.connection.pages import all_pages
from registry.store.evaluations import EVALUATION_TAG, Evaluations
from registry.store.foreign_models import ForeignModels
from registry.store.model_names import DIGEST_TAG, ModelNames

# Where MLflow puts the folder that ``bundle_upload`` gives it.
BUNDLE_PATH = "data/bundle"
SIGNATURE_TAG = "convoy.signature"
# What the databases take for a number: 32 bits.
MAX_VERSION_NUMBER = 2**31 - 1
# That of a model with 10,000 classes is about 1 MB long.
MAX_MANIFEST_BYTES = 16 * 1024 * 1024


class ModelStore:
    """An MLflow registry: a database or server, and a place for artefacts.

    Attributes:
        connection: to MLflow.
        names: the names of models and of their logs.
        aliases: which version is the champion, and so on.
        audit_logs: the decisions.
        foreign: the versions that Convoy did not publish.
        evaluations: held-out records that came after publishing.
    """

    def __init__(self, paths: Paths) -> None:
        self.connection = MlflowConnection(paths)
        self.names = ModelNames(self.connection)
        self.aliases = Aliases(self.connection, paths.decided)
        self.audit_logs = AuditLogStore(self.connection, self.names)
        self.foreign = ForeignModels(self.connection)
        self.evaluations = Evaluations(self.connection)
        self._client = self.connection.client
        self._artifacts = Artifacts(self.connection)

    def publish(self, bundle: Bundle, tags: dict[str, str]) -> ModelVersion:
        """Log ``bundle`` to the active run, register it as the next version, call it challenger.

        The first version of a name makes the model's log, too.

        Raises:
            RegistryUnavailable: the registry did not take it.
            PromotionRefused: as ``ModelNames.check``.
        """
        from registry.store.bundle_upload import register, upload

        name = bundle.manifest.model
        self.names.check(name)  # before the upload, which may take long
        with self.connection.errors():
            uri = upload(bundle)
            self.names.claim(name)
            version = register(uri, name, {DIGEST_TAG: bundle.manifest_sha256, **tags})
            self.aliases.set_challenger(name, version)
        return self.resolve(ModelRef(name, version))

    def models(self) -> list[str]:
        """Names of all registered models that could be Convoy's, in alphabetical order."""
        with self.connection.errors():
            found = all_pages(self._client.search_registered_models)
        return sorted(model.name for model in found if MODEL_NAME.fullmatch(model.name))

    def versions(self, name: str) -> list[tuple[ModelVersion, dict[str, str]]]:
        """Every version of ``name`` that Convoy published, with its tags, newest first.

        Raises:
            VersionNotFound: no model of that name.
        """
        aliases = self.aliases.read(name)
        with self.connection.errors():
            found = all_pages(self._client.search_model_versions, f"name = '{name}'")
        rows = [
            (_model_version(entity, aliases), dict(entity.tags))
            for entity in found
            if DIGEST_TAG in entity.tags
        ]
        return sorted(rows, key=lambda row: -row[0].version)

    def resolve(self, ref: ModelRef) -> ModelVersion:
        """The version that ``ref`` means now.

        Raises:
            VersionNotFound: no such model, version or alias.
            RegistryUnavailable: the registry could not be asked.
        """
        return self.resolve_in(self.aliases.read(ref.name), ref)

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
        with self.connection.errors(missing):
            entity = self._client.get_model_version(ref.name, str(number))
        return _model_version(entity, aliases)

    def champion_and_candidate(
        self, name: str, version: int
    ) -> tuple[ModelVersion | ForeignVersion | None, ModelVersion]:
        """The champion, as ``find_any`` gives it, and ``version`` beside it."""
        aliases = self.aliases.read(name)
        challenger = self.resolve_in(aliases, ModelRef(name, version))
        return self.find_any(name, aliases.get(CHAMPION)), challenger

    def find_any(self, name: str, number: int | None) -> ModelVersion | ForeignVersion | None:
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
        found = self.find_any(name, number)
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
        with self.connection.errors():
            source = self._client.get_model_version_download_uri(version.name, str(version.version))
        folder.mkdir(parents=True, exist_ok=True)
        self._artifacts.fetch(source, f"{BUNDLE_PATH}/{MANIFEST}", folder, MAX_MANIFEST_BYTES)
        bundle = open_bundle(folder, version.manifest_sha256)
        names = list(wanted(bundle))
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            size_bytes = bundle.entry(name).size_bytes
            self._artifacts.fetch(source, f"{BUNDLE_PATH}/{name}", target.parent, size_bytes)
        bundle.verify(names)
        return bundle

    def sign(self, version: ModelVersion, envelope: str) -> None:
        """Keep the ``envelope`` of a signature with the version, instead of an earlier one."""
        with self.connection.errors():
            self._client.set_model_version_tag(
                version.name, str(version.version), SIGNATURE_TAG, envelope
            )


def _model_version(entity: Any, aliases: dict[str, int]) -> ModelVersion:
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
        evaluation_sha256=_digest_or_none(entity.tags.get(EVALUATION_TAG)),
    )


def _digest_or_none(tag: str | None) -> str | None:
    """A digest from a tag, which anyone with access to MLflow may set to anything."""
    return tag if tag is not None and re.fullmatch("[0-9a-f]{64}", tag) else None
