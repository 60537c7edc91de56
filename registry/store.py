"""``ModelStore``: versions, aliases and files in an MLflow registry.

MLflow's loose types stop here, its exceptions in ``registry.mlflow_connection``. Importing it costs
seconds and 170 MB: nothing that serves may do so.
"""

import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

# First of all: it tells MLflow how long to wait, before MLflow is imported.
from registry.mlflow_connection import Connection  # isort: split

import mlflow
import msgspec
import sqlalchemy.exc
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, Schema
from mlflow.types.schema import Array

from registry.bundle import MANIFEST, Bundle, open_bundle
from registry.contract import (
    CHALLENGER,
    CHAMPION,
    MODEL_NAME,
    PREVIOUS,
    Manifest,
    ModelRef,
    ModelVersion,
    Trial,
)
from registry.errors import BundleInvalid, RegistryUnavailable, VersionNotFound
from registry.home import Home
from registry.ledger import Entry, Ledger

log = logging.getLogger(__name__)

DIGEST_TAG = "convoy.manifest_sha256"
# A model's ledger is registered under its name and this, which no model's name may have.
LEDGER = ".ledger"
ENTRY_TAG, HEAD_TAG = "convoy.entry", "convoy.ledger_head"
TRIAL_TAG = "convoy.trial"
SIGNATURE_TAG = "convoy.signature"
# What the databases take for a number: 32 bits.
MOST_VERSIONS = 2**31 - 1
APPEND_TRIES = 20
# Where mlflow.pyfunc.log_model puts its data_path.
BUNDLE_PATH = "data/bundle"

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


class ModelStore:
    """An MLflow registry: a database or server, and a place for artefacts."""

    def __init__(self, home: Home) -> None:
        self._connection = Connection(home)
        self._client = self._connection.client
        self.uri = self._connection.uri
        self._decided = home.decided

    def experiment(self, name: str) -> str:
        """The id of the experiment ``name``, made if there is none, restored if it was deleted."""
        return self._connection.experiment(name)

    def errors(self, not_found: str | None = None) -> AbstractContextManager[None]:
        """MLflow's exceptions as ours; see ``Connection.errors``."""
        return self._connection.errors(not_found)

    def publish(self, bundle: Bundle, tags: dict[str, str]) -> ModelVersion:
        """Log ``bundle`` to the active run, register it as the next version, call it challenger.

        Raises:
            RegistryUnavailable: the registry did not take it.
        """
        assert bundle.folder.name == Path(BUNDLE_PATH).name
        name = bundle.manifest.model
        with self.errors():
            with warnings.catch_warnings():
                # The signature is given; an example would only be run to guess one.
                warnings.filterwarnings("ignore", ".*input example was not provided")
                logged = mlflow.pyfunc.log_model(
                    name=name,
                    loader_module="registry.pyfunc",
                    data_path=str(bundle.folder),
                    signature=SIGNATURE,
                    pip_requirements=[
                        f"{package}=={version}"
                        for package, version in bundle.manifest.source.versions.items()
                        if package != "python"
                    ],
                )
            registered = mlflow.register_model(
                logged.model_uri, name, tags={DIGEST_TAG: bundle.manifest_sha256, **tags}
            )
            version = int(registered.version)
            self._client.set_registered_model_alias(name, CHALLENGER, str(version))
        return self.resolve(ModelRef(name, version))

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
        return self.standing(name)[0]

    def standing(self, name: str) -> tuple[dict[str, int], Trial | None]:
        """Alias → version number, and what is on trial, as of one moment."""
        with self.errors(f"there is no model {name!r} in the registry"):
            model = self._client.get_registered_model(name)
        aliases = {alias: int(version) for alias, version in model.aliases.items()}
        said = model.tags.get(TRIAL_TAG)
        try:
            return aliases, msgspec.json.decode(said, type=Trial) if said else None
        except (msgspec.MsgspecError, ValueError) as error:
            log.warning("%s: the tag %s is ignored: %s", name, TRIAL_TAG, error)
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
        if number > MOST_VERSIONS:
            raise VersionNotFound(missing)
        with self.errors(missing):
            entity = self._client.get_model_version(ref.name, str(number))
        return self._model_version(entity, aliases)

    def sides(self, name: str, version: int) -> tuple[ModelVersion | None, ModelVersion]:
        """The champion, unless there is none or it was deleted, and ``version`` beside it."""
        aliases = self.aliases(name)
        challenger = self.resolve_in(aliases, ModelRef(name, version))
        champion = None
        with suppress(VersionNotFound, BundleInvalid):
            champion = self.resolve_in(aliases, ModelRef(name, alias=CHAMPION))
        return champion, challenger

    def find(self, name: str, number: int | None) -> ModelVersion | None:
        """The version, or None when there is no such number, or none of Convoy's any more."""
        if number is None:
            return None
        try:
            return self.resolve(ModelRef(name, number))
        except (VersionNotFound, BundleInvalid):
            return None

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

        MLflow's downloads carry no checksums, so only the bundle's own digests tell whether a file
        came whole; the manifest's own digest comes from the registry's database.

        Raises:
            BundleInvalid: something that came is not what was published.
        """
        with self.errors():
            source = self._client.get_model_version_download_uri(version.name, str(version.version))
        folder.mkdir(parents=True, exist_ok=True)
        self._fetch(f"{source}/{BUNDLE_PATH}/{MANIFEST}", folder)
        bundle = open_bundle(folder, version.manifest_sha256)
        names = list(wanted(bundle))
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self._fetch(f"{source}/{BUNDLE_PATH}/{name}", target.parent)
        bundle.verify(names)
        return bundle

    def point(
        self,
        name: str,
        *,
        champion: int | None,
        previous: int | None,
        trial: Trial | None = None,
    ) -> None:
        """Point the aliases ``champion`` and ``previous`` at these versions; None leaves one alone.

        And say what is on ``trial``. ``previous`` moves first: a crash in between leaves the old
        champion serving. A new champion is no challenger any more.
        """
        aliases, tried = self.standing(name)
        if trial != tried:
            with self.errors():
                said = msgspec.json.encode(trial).decode() if trial else ""
                self._client.set_registered_model_tag(name, TRIAL_TAG, said)
        with suppress(VersionNotFound):  # what was left may have been deleted since
            self._set_alias(name, aliases, PREVIOUS, previous)
        self._set_alias(name, aliases, CHAMPION, champion)
        if champion is not None and self.aliases(name).get(CHALLENGER) == champion:
            with self.errors():
                self._client.delete_registered_model_alias(name, CHALLENGER)
        with suppress(OSError):  # a puller that is not woken looks by itself soon
            self._decided.touch()

    def sign(self, version: ModelVersion, envelope: str) -> None:
        """Keep the ``envelope`` of a signature with the version, instead of an earlier one."""
        with self.errors():
            self._client.set_model_version_tag(
                version.name, str(version.version), SIGNATURE_TAG, envelope
            )

    def append(self, name: str, entry: Entry) -> None:
        """Write ``entry`` at the end of the ledger of ``name``.

        A ledger is a registered model of its own whose versions are the lines: the one thing that
        an MLflow registry, be it a database or a server, numbers for several writers at once. It
        is backed up with the registry, and shows in its pages.
        """
        data = entry.to_json()
        ledger = f"{name}{LEDGER}"
        tags = {ENTRY_TAG: data.decode()}
        # MLflow insists on one; models:/ it would resolve, and fail for a version that is gone.
        source = f"convoy:/{name}/{entry.to_version}"  # servers want an absolute path
        about = f"{entry.action} {entry.to_version}: {entry.reason or entry.verdict or ''}"[:1000]
        with self.errors():
            for _ in range(APPEND_TRIES):
                try:
                    self._client.create_model_version(
                        ledger, source, tags=tags, description=about, await_creation_for=0
                    )
                    return
                except MlflowException as error:
                    if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                        self._make_ledger(ledger, name)
                    elif "Giving up after" not in str(error):  # MLflow lost the race three times
                        raise
        raise RegistryUnavailable(f"{ledger}: no line could be written; try again")

    def ledger(self, name: str) -> Ledger:
        """Every decision about ``name``; empty before the first."""
        with self.errors():
            found = _all_pages(self._client.search_model_versions, f"name = '{name}{LEDGER}'")
        return Ledger((int(line.version), line.tags.get(ENTRY_TAG, "").encode()) for line in found)

    def ledger_head(self, name: str) -> tuple[int, str] | None:
        """``Ledger.head`` as it was noted beside the ledger."""
        try:
            with self.errors(f"{name} has no ledger"):
                tags = self._client.get_registered_model(f"{name}{LEDGER}").tags
        except VersionNotFound:
            return None
        number, _, digest = tags.get(HEAD_TAG, "").partition(" ")
        return (int(number), digest) if number.isdecimal() else None

    def note_head(self, name: str, ledger: Ledger) -> None:
        """Note the head of ``ledger`` beside it, so that it shows when its end is cut off."""
        number, digest = ledger.head
        with self.errors():
            self._client.set_registered_model_tag(f"{name}{LEDGER}", HEAD_TAG, f"{number} {digest}")

    def _make_ledger(self, ledger: str, name: str) -> None:
        about = f"What was decided about the champion of {name}, a line each. Convoy writes it."
        try:
            self._client.create_registered_model(ledger, description=about)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _set_alias(
        self, name: str, aliases: dict[str, int], alias: str, version: int | None
    ) -> None:
        if version is not None and aliases.get(alias) != version:
            with self.errors(f"{name} has no version {version}"):
                self._client.get_model_version(name, str(version))
                try:
                    self._client.set_registered_model_alias(name, alias, str(version))
                except (MlflowException, sqlalchemy.exc.IntegrityError) as error:
                    # Of two who make an alias at once MLflow fails one; there is one to move then.
                    if not any(sign in str(error) for sign in ("UNIQUE", "duplicate key")):
                        raise
                    self._client.set_registered_model_alias(name, alias, str(version))

    def _fetch(self, uri: str, folder: Path) -> None:
        with self.errors():
            try:
                mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder))
            except (MlflowException, OSError) as error:
                # MLflow says "missing" in a different way for each kind of artefact storage.
                if isinstance(error, FileNotFoundError) or any(
                    sign in str(error)
                    for sign in (
                        "No such artifact",
                        "404 Client Error",
                        "404 GET",
                        "(404)",
                        "NoSuchKey",
                    )
                ):
                    raise BundleInvalid(f"{uri} is missing from the artefacts") from error
                reason = str(error).strip().splitlines()[-1]
                raise RegistryUnavailable(f"{uri} could not be fetched: {reason}") from error

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
