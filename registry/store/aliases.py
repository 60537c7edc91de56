"""``Aliases``: which version is the champion, the previous one, the challenger and the canary.

MLflow changes an alias without comparing. So the audit log decides, and the aliases follow it
(``registry.promotion.decisions``).
"""

import logging
from contextlib import suppress
from pathlib import Path

import msgspec

from registry.core.errors import VersionNotFound
from registry.model.refs import CHALLENGER, CHAMPION, PREVIOUS, Canary
from registry.store.connection.mlflow_connection import (
    MlflowConnection,
    mlflow_errors,
    storage_errors,
)
from registry.store.model_names import DIGEST_TAG

log = logging.getLogger(__name__)

CANARY_TAG = "convoy.canary"


class Aliases:
    """The aliases of all models in one registry."""

    def __init__(self, connection: MlflowConnection, decided: Path) -> None:
        """Use ``connection``; each change touches the file ``decided``."""
        self._client = connection.client
        self._errors = connection.errors
        self._decided = decided

    def read(self, name: str) -> dict[str, int]:
        """Alias → version number."""
        return self.read_with_canary(name)[0]

    def read_with_canary(self, name: str) -> tuple[dict[str, int], Canary | None]:
        """Alias → version number, and the canary, both read at one moment.

        Raises:
            VersionNotFound: no model of that name.
        """
        with self._errors(f"there is no model {name!r} in the registry"):
            model = self._client.get_registered_model(name)
        aliases = {alias: int(version) for alias, version in model.aliases.items()}
        said = model.tags.get(CANARY_TAG)
        try:
            return aliases, msgspec.json.decode(said, type=Canary) if said else None
        except (msgspec.MsgspecError, ValueError) as error:
            log.warning("%s: the tag %s is ignored: %s", name, CANARY_TAG, error)
            return aliases, None

    def set_champion(
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
        aliases, present = self.read_with_canary(name)
        if canary != present:
            with self._errors():
                said = msgspec.json.encode(canary).decode() if canary else ""
                self._client.set_registered_model_tag(name, CANARY_TAG, said)
        with suppress(VersionNotFound):  # the previous champion may have been deleted since
            self._set(name, aliases, PREVIOUS, previous)
        self._set(name, aliases, CHAMPION, champion)
        if champion is not None and self.read(name).get(CHALLENGER) == champion:
            self._end_challenge(name, champion, previous)
        with suppress(OSError):  # without this file, the puller polls within seconds
            self._decided.touch()

    def set_challenger(self, name: str, version: int) -> None:
        """Point the alias ``challenger`` at ``version``."""
        self._set(name, {}, CHALLENGER, version)

    def _end_challenge(self, name: str, champion: int, previous: int | None) -> None:
        """Delete the alias ``challenger``, and give it to a version that is published meanwhile.

        MLflow deletes an alias without comparing. A version that was published just before lost its
        alias by this: the newest version gets it again, unless that is the ``previous`` champion.
        """
        with self._errors():
            self._client.delete_registered_model_alias(name, CHALLENGER)
        newest = champion
        while (published := self._newest(name)) > newest:
            newest, aliases = published, self.read(name)
            if newest != previous and aliases.get(CHALLENGER, 0) < newest:
                with suppress(VersionNotFound):  # it was deleted since
                    self._set(name, aliases, CHALLENGER, newest)

    def _newest(self, name: str) -> int:
        """The highest number of a version of ``name``; 0 when Convoy did not publish that."""
        with self._errors():
            found = self._client.search_model_versions(
                f"name = '{name}'", max_results=1, order_by=["version_number DESC"]
            )
        return next((int(entity.version) for entity in found if DIGEST_TAG in entity.tags), 0)

    def _set(self, name: str, aliases: dict[str, int], alias: str, version: int | None) -> None:
        if version is not None and aliases.get(alias) != version:
            with self._errors(f"{name} has no version {version}"):
                self._client.get_model_version(name, str(version))
                try:
                    self._client.set_registered_model_alias(name, alias, str(version))
                except mlflow_errors() + storage_errors() as error:
                    # When two callers make an alias at once, MLflow fails one of them. The alias
                    # exists then, and can be moved.
                    if not any(sign in str(error) for sign in ("UNIQUE", "duplicate key")):
                        raise
                    self._client.set_registered_model_alias(name, alias, str(version))
