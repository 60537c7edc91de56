"""``ModelNames``: the names of models and of their audit logs in a registry.

MLflow lets every account create a registered model and gives its creator all rights to it.
Publishing creates the log before the model. So Convoy refuses a log that is over a minute younger
than its model.
"""

import secrets
import time
from contextlib import suppress
from typing import Any

from registry.core.errors import PromotionRefused, RegistryUnavailable, VersionNotFound
from registry.store.connection.mlflow_connection import MlflowConnection

# The audit log of a model is registered under the model's name and this, which no model's name has.
AUDIT_LOG = ".ledger"
CLAIM_TAG = "convoy.claim"
# Every version that Convoy published has this tag, the digest of its manifest.
DIGEST_TAG = "convoy.manifest_sha256"
# A first version of the same name may be on its way: its publisher needs three calls.
CLAIM_TIMEOUT_S, CLAIM_INTERVAL_S = 10.0, 0.25
# A log is made before its model; the server's clock may be set between.
LOG_YOUNGER_S = 60.0


class ModelNames:
    """The registered models of one registry."""

    def __init__(self, connection: MlflowConnection) -> None:
        self._client = connection.client
        self._errors = connection.errors

    def registered(self, name: str) -> Any:
        """MLflow's registered model; None when there is none of that name."""
        with suppress(VersionNotFound), self._errors(f"{name} is not registered"):
            return self._client.get_registered_model(name)
        return None

    def check_log(self, name: str) -> None:
        """Refuse to follow a log that publishing did not make.

        MLflow lets every account create a registered model, and gives its creator all rights to it.
        Publishing makes the log before the model. So a log that is missing, or younger than its
        model, may come from another account. MLflow's server sets both times.

        Raises:
            PromotionRefused: it is such a log.
            VersionNotFound: there is no such model.
        """
        model, log_model = self.registered(name), self.registered(f"{name}{AUDIT_LOG}")
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

    def check(self, name: str) -> None:
        """Refuse a name under which no version can be published. Changes nothing.

        Raises:
            PromotionRefused: the registry has a log or a model of that name but no version, or a
                log that publishing did not make.
        """
        self._is_new(name)

    def _is_new(self, name: str) -> bool:
        """Whether the registry has neither a model nor a log of ``name``; raises as ``check``.

        Another process may be publishing a first version and have made only the log, or the log and
        the model. This checks again for ``CLAIM_TIMEOUT_S``.
        """
        deadline = time.monotonic() + CLAIM_TIMEOUT_S
        while True:
            known = [each for each in (name, f"{name}{AUDIT_LOG}") if self.registered(each)]
            if not known:
                return True
            if name in known and self._has_versions(name):
                self.check_log(name)
                return False
            if time.monotonic() >= deadline:  # it is not a first version of this moment
                break
            time.sleep(CLAIM_INTERVAL_S)
        raise PromotionRefused(
            f"cannot publish as {name}: MLflow has the registered model {' and '.join(known)}, but "
            f"no version of {name}. A publication may have ended before its version, the versions "
            "may have been deleted, or another account may have made it and would decide what "
            "serves. Delete it in MLflow, which also deletes the decisions in a log, and publish "
            "again, or publish under another name"
        )

    def claim(self, name: str) -> None:
        """Make the log of ``name``, and then the model, unless an earlier version did.

        Raises:
            PromotionRefused: as ``check``.
            RegistryUnavailable: another account made one of them and deleted it meanwhile.
        """
        if self._is_new(name) and not self._made_both(name) and self._is_new(name):
            raise RegistryUnavailable(
                f"the registered model {name} was made and deleted at once; publish again"
            )

    def _made_both(self, name: str) -> bool:
        """Whether this call made the log and the model; False if another process makes them."""
        about = f"What was decided about the champion of {name}, a line each. Convoy writes it."
        return self._made(f"{name}{AUDIT_LOG}", about) and self._made(name)

    def _made(self, name: str, about: str | None = None) -> bool:
        """Whether this call made the registered model ``name``; False when another one did.

        A client repeats a request whose answer was lost, and the repeated one fails. If the tag of
        the model holds this call's claim, this call made the model.
        """
        claim = secrets.token_hex(16)
        try:
            with self._errors():
                self._client.create_registered_model(name, {CLAIM_TAG: claim}, about)
        except RegistryUnavailable as error:
            if getattr(error.__cause__, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                raise
            found = self.registered(name)
            return found is not None and found.tags.get(CLAIM_TAG) == claim
        return True

    def _has_versions(self, name: str) -> bool:
        with self._errors():
            return bool(self._client.search_model_versions(f"name = '{name}'", max_results=1))
