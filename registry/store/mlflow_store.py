"""``ModelStore``: versions, aliases and files in an MLflow registry.

MLflow's loose types stop here, its exceptions in ``registry.store.mlflow_connection``. Importing it
costs seconds and 170 MB: nothing that serves may do so.
"""

import logging
import re
import secrets
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

# First of all: it tells MLflow how long to wait, before MLflow is imported.
from registry.store.mlflow_connection import MlflowConnection  # isort: split

import mlflow
import msgspec
import sqlalchemy.exc
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.types import ColSpec, DataType, ParamSchema, Schema
from mlflow.types.schema import Array
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from registry.core.errors import (
    BundleInvalid,
    PromotionRefused,
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
from registry.store.audit_log import AuditLog, Entry

log = logging.getLogger(__name__)

DIGEST_TAG = "convoy.manifest_sha256"
# A model's ledger is registered under its name and this, which no model's name may have.
AUDIT_LOG = ".ledger"
ENTRY_TAG, NEWEST_TAG = "convoy.entry", "convoy.newest_line"
CANARY_TAG = "convoy.canary"
SIGNATURE_TAG = "convoy.signature"
CLAIM_TAG = "convoy.claim"
# What the databases take for a number: 32 bits.
MAX_VERSION_NUMBER = 2**31 - 1
APPEND_TRIES = 20
# A first version of the same name may be on its way: its maker needs three calls.
CLAIM_TIMEOUT_S, CLAIM_INTERVAL_S = 10.0, 0.25
# A log is made before its model; the server's clock may be set between.
LOG_YOUNGER_S = 60.0
# Where mlflow.pyfunc.log_model puts its data_path.
BUNDLE_PATH = "data/bundle"
# That of a model with 10,000 classes is about 1 MB long.
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
BLOCK_BYTES = 64 * 1024

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

    def __init__(self, paths: Paths) -> None:
        self._connection = MlflowConnection(paths)
        self._client = self._connection.client
        self.uri = self._connection.uri
        self._decided = paths.decided

    def experiment(self, name: str) -> str:
        """The id of the experiment ``name``, made if there is none, restored if it was deleted."""
        return self._connection.experiment(name)

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
        assert bundle.folder.name == Path(BUNDLE_PATH).name
        name = bundle.manifest.model
        self.check_name(name)  # before the upload; the claim after it leaves nothing half for long
        with self.errors():
            with warnings.catch_warnings():
                # The signature is given; an example would only be run to guess one.
                warnings.filterwarnings("ignore", ".*input example was not provided")
                logged = mlflow.pyfunc.log_model(
                    name=name,
                    loader_module="registry.model.mlflow_pyfunc",
                    data_path=str(bundle.folder),
                    signature=SIGNATURE,
                    pip_requirements=[
                        f"{package}=={version}"
                        for package, version in bundle.manifest.source.versions.items()
                        if package != "python"
                    ],
                )
            self._claim(name)
            registered = mlflow.register_model(
                logged.model_uri, name, tags={DIGEST_TAG: bundle.manifest_sha256, **tags}
            )
            version = int(registered.version)
            self._set_alias(name, {}, CHALLENGER, version)
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
        return self.aliases_and_canary(name)[0]

    def aliases_and_canary(self, name: str) -> tuple[dict[str, int], Canary | None]:
        """Alias → version number, and what is on trial, as of one moment."""
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

        MLflow's downloads carry no checksums, so only the bundle's own digests tell whether a file
        came whole; the manifest's own digest comes from the registry's database. Of a manifest at
        most ``MAX_MANIFEST_BYTES`` are fetched, of any other file what the manifest says.

        Raises:
            BundleInvalid: something that came is not what was published, or the manifest does not
                name a wanted file.
        """
        with self.errors():
            source = self._client.get_model_version_download_uri(version.name, str(version.version))
        folder.mkdir(parents=True, exist_ok=True)
        self._fetch(f"{source}/{BUNDLE_PATH}/{MANIFEST}", folder, MAX_MANIFEST_BYTES)
        bundle = open_bundle(folder, version.manifest_sha256)
        names = list(wanted(bundle))
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            size_bytes = bundle.entry(name).size_bytes
            self._fetch(f"{source}/{BUNDLE_PATH}/{name}", target.parent, size_bytes)
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
        """Point the aliases ``champion`` and ``previous`` at these versions; None leaves one alone.

        And say what is on ``canary``. ``previous`` moves first: a crash in between leaves the old
        champion serving. A new champion is no challenger any more.
        """
        aliases, tried = self.aliases_and_canary(name)
        if canary != tried:
            with self.errors():
                said = msgspec.json.encode(canary).decode() if canary else ""
                self._client.set_registered_model_tag(name, CANARY_TAG, said)
        with suppress(VersionNotFound):  # what was left may have been deleted since
            self._set_alias(name, aliases, PREVIOUS, previous)
        self._set_alias(name, aliases, CHAMPION, champion)
        if champion is not None and self.aliases(name).get(CHALLENGER) == champion:
            self._end_challenge(name, champion, previous)
        with suppress(OSError):  # a puller that is not woken looks by itself soon
            self._decided.touch()

    def _end_challenge(self, name: str, champion: int, previous: int | None) -> None:
        """Delete the alias ``challenger``, and give it to a version that is published meanwhile.

        MLflow deletes an alias without comparing, so a publication may just have moved it. The
        newest version after the champion lost it then, unless it is the ``previous`` champion.
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
        """Write ``entry`` at the end of the ledger of ``name``.

        A ledger is a registered model of its own whose versions are the lines: the one thing that
        an MLflow registry, be it a database or a server, numbers for several writers at once. It
        is backed up with the registry, and shows in its pages.
        """
        data = entry.to_json()
        audit_log = f"{name}{AUDIT_LOG}"
        tags = {ENTRY_TAG: data.decode()}
        # MLflow insists on one; models:/ it would resolve, and fail for a version that is gone.
        source = f"convoy:/{name}/{entry.to_version}"  # servers want an absolute path
        about = f"{entry.action} {entry.to_version}: {entry.reason or entry.details or ''}"[:1000]
        with self.errors():
            for _ in range(APPEND_TRIES):
                try:
                    self._client.create_model_version(
                        audit_log, source, tags=tags, description=about, await_creation_for=0
                    )
                    return
                except MlflowException as error:
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
        """The number of the log's newest line, as it was noted beside the lines."""
        log_model = self._registered(f"{name}{AUDIT_LOG}")
        number = log_model.tags.get(NEWEST_TAG, "") if log_model else ""
        return int(number) if number.isdecimal() else None

    def note_newest(self, name: str, audit_log: AuditLog) -> None:
        """Note the number of the newest line beside the log: a cut at its end shows then."""
        with self.errors():
            self._client.set_registered_model_tag(
                f"{name}{AUDIT_LOG}", NEWEST_TAG, str(audit_log.last)
            )

    def check_log(self, name: str) -> None:
        """Refuse to follow a log that publishing did not make.

        MLflow lets every account create a registered model, and gives its creator all rights to it.
        Publishing makes the log before the model, so a log that is missing, or younger than its
        model, can be anybody's. MLflow's server sets both times.

        Raises:
            PromotionRefused: it is such a log.
            VersionNotFound: there is no such model.
        """
        model, log_model = self._registered(name), self._registered(f"{name}{AUDIT_LOG}")
        if model is None:
            raise VersionNotFound(f"there is no model {name!r} in the registry")
        if log_model is None:
            raise PromotionRefused(
                f"{name}: its log, the registered model {name}{AUDIT_LOG}, is missing. Publishing "
                "made it, and one that is made now is not followed: restore the registry from a "
                "backup, or publish under another name"
            )
        younger_s = (log_model.creation_timestamp - model.creation_timestamp) / 1000
        if younger_s > LOG_YOUNGER_S:
            raise PromotionRefused(
                f"{name}: its log, the registered model {name}{AUDIT_LOG}, was made "
                f"{younger_s:,.0f} s after the model, so publishing did not make it, and it is not "
                "followed: restore the registry from a backup, or publish under another name"
            )

    def check_name(self, name: str) -> None:
        """Refuse a name under which no version can be published. Changes nothing.

        Raises:
            PromotionRefused: the registry has a log or a model of that name but no version, or a
                log that publishing did not make.
        """
        self._is_new(name)

    def _is_new(self, name: str) -> bool:
        """Whether the registry has neither a model nor a log of ``name``; raises as ``check_name``.

        Another process may be publishing a first version, so half of it is looked at again.
        """
        deadline = time.monotonic() + CLAIM_TIMEOUT_S
        while True:
            known = [each for each in (name, f"{name}{AUDIT_LOG}") if self._registered(each)]
            if not known:
                return True
            if name in known and self._has_versions(name):
                self.check_log(name)
                return False
            if time.monotonic() >= deadline:  # it is not a first version of this moment
                break
            time.sleep(CLAIM_INTERVAL_S)
        raise PromotionRefused(
            f"nothing can be published as {name}: MLflow has the registered model "
            f"{' and '.join(known)}, but no version of {name}. A publication may have ended before "
            "its version, the versions may have been deleted, or another account may have made it "
            "and would decide what serves. Delete it in MLflow, with the decisions that a log "
            "holds, and publish again, or publish under another name"
        )

    def _claim(self, name: str) -> None:
        """Make the log of ``name``, and then the model, unless an earlier version did.

        Raises:
            PromotionRefused: as ``check_name``.
            RegistryUnavailable: another account made one of them and deleted it meanwhile.
        """
        if self._is_new(name) and not self._made_both(name) and self._is_new(name):
            raise RegistryUnavailable(
                f"the registered model {name} was made and deleted at once; publish again"
            )

    def _made_both(self, name: str) -> bool:
        """Whether this call made the log and the model; False when others are at it."""
        about = f"What was decided about the champion of {name}, a line each. Convoy writes it."
        return self._made(f"{name}{AUDIT_LOG}", about) and self._made(name)

    def _made(self, name: str, about: str | None = None) -> bool:
        """Whether this call made the registered model ``name``; False when another one did.

        MLflow's client sends a request again when its answer was lost. The model is there then, and
        the ``claim`` in its tags tells that this call made it.
        """
        claim = secrets.token_hex(16)
        try:
            with self.errors():
                self._client.create_registered_model(name, {CLAIM_TAG: claim}, about)
        except RegistryUnavailable as error:
            if getattr(error.__cause__, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                raise
            found = self._registered(name)
            return found is not None and found.tags.get(CLAIM_TAG) == claim
        return True

    def _registered(self, name: str) -> Any:
        """MLflow's registered model; None when there is none of that name."""
        with suppress(VersionNotFound), self.errors(f"{name} is not registered"):
            return self._client.get_registered_model(name)
        return None

    def _has_versions(self, name: str) -> bool:
        with self.errors():
            return bool(self._client.search_model_versions(f"name = '{name}'", max_results=1))

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

    def _fetch(self, uri: str, folder: Path, max_bytes: int) -> None:
        """Fetch the file at ``uri`` into ``folder``; ``BundleInvalid`` if it is larger."""
        root, _, name = uri.rpartition("/")
        with self.errors():
            try:
                repository = get_artifact_repository(root, tracking_uri=self.uri)
                if isinstance(repository, HttpArtifactRepository):
                    _receive(repository, name, folder / name, max_bytes)
                else:
                    _check_size(repository, name, max_bytes)
                    repository.download_artifacts(name, str(folder))
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


def _check_size(repository: ArtifactRepository, name: str, max_bytes: int) -> None:
    """Raise ``BundleInvalid`` unless the file ``name`` has at most ``max_bytes``, as it is listed.

    A folder has no size, and MLflow would download all that lies in it.
    """
    for listed in repository.list_artifacts():
        size_bytes = listed.file_size
        if Path(listed.path).name == name and (size_bytes is None or size_bytes > max_bytes):
            what = "of unknown size" if size_bytes is None else f"{size_bytes:,} bytes long"
            raise BundleInvalid(_too_large(repository, name, what, max_bytes))


def _receive(repository: HttpArtifactRepository, name: str, target: Path, max_bytes: int) -> None:
    """Download the file ``name``; ``BundleInvalid`` once a server has sent more than ``max_bytes``.

    A server may list any size and send another, so the bytes are counted as they come.
    """
    credentials = get_default_host_creds(repository.artifact_uri)
    # Compressed answers would be counted after they were unpacked.
    plain = {"Accept-Encoding": "identity"}
    answer = http_request(credentials, f"/{name}", "GET", stream=True, extra_headers=plain)
    with answer, target.open("wb") as file:
        answer.raise_for_status()
        received = 0
        for block in answer.iter_content(BLOCK_BYTES):
            received += len(block)
            if received > max_bytes:
                what = "longer"
                raise BundleInvalid(_too_large(repository, name, what, max_bytes))
            file.write(block)


def _too_large(repository: ArtifactRepository, name: str, what: str, max_bytes: int) -> str:
    return f"{repository.artifact_uri}/{name} is {what}; at most {max_bytes:,} bytes are fetched"


def _all_pages(search: Callable[..., Any], *arguments: str) -> list[Any]:
    """Everything that one of MLflow's searches finds, page by page."""
    found: list[Any] = []
    token: str | None = None  # of the next page
    while token != "":  # nosec B105
        page = search(*arguments, page_token=token)
        found += page
        token = page.token or ""
    return found
