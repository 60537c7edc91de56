"""Access control: which callers may use the service (tokens), and how often (rates)."""

import math
from typing import TYPE_CHECKING

from registry.auth.tokens import Token, Tokens
from registry.core.errors import KeyInsufficient, KeyMissing, RateExceeded
from registry.core.names import sha256_hex
from service.access.rate_limit import RateLimiter, parse_address
from service.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_UNKNOWN = "send a key that is known here: Authorization: Bearer …"


class Door:
    """Lets callers in; both methods raise what is to be answered instead."""

    def __init__(self, settings: Settings) -> None:
        self._asks_for_keys = settings.keys == "required"
        self._tokens = Tokens(settings.tokens)
        key = settings.service_key
        self._service_digest = sha256_hex(key.encode()) if key else None
        self._rates = (
            RateLimiter(settings.rate, settings.burst, settings.run_folder)
            if settings.rate is not None
            else None
        )
        self._proxies = settings.proxy_networks

    def admit(self, environ: "WSGIEnvironment", again: bool = False) -> None:
        """One classification; ``again`` when it was counted already.

        Raises:
            KeyMissing, KeyInsufficient: by the caller's key.
            KeysUnavailable: there are keys, and they cannot be read.
            RateExceeded: it has asked too often.
        """
        caller = self._address(environ)
        if self._asks_for_keys:
            token = self._find(environ)
            if not token.may_classify:
                raise KeyInsufficient(f"the key {token.name!r} may look, not classify")
            caller = f"key {token.name}"
        if self._rates is not None and not again and (wait_s := self._rates.take(caller)):
            raise RateExceeded("you ask more often than you may", math.ceil(wait_s))

    def admit_looker(self, environ: "WSGIEnvironment") -> None:
        """Somebody who wants to see models, traffic or metrics; raises as ``admit``."""
        if not self._asks_for_keys:
            return
        if sha256_hex(_bearer(environ).encode()) == self._service_digest:
            return  # of digests, so that the time says nothing
        token = self._find(environ)
        if not token.may_look:
            raise KeyInsufficient(f"the key {token.name!r} may classify, not look")

    def _address(self, environ: "WSGIEnvironment") -> str:
        """The client's address; behind a trusted proxy, the last entry of X-Forwarded-For."""
        peer: str = environ.get("REMOTE_ADDR", "")
        if self._proxies and (address := parse_address(peer)):
            told = parse_address(environ.get("HTTP_X_FORWARDED_FOR", "").rpartition(",")[2].strip())
            if told and any(address in network for network in self._proxies):
                return str(told)
        return peer

    def _find(self, environ: "WSGIEnvironment") -> Token:
        token = self._tokens.find(_bearer(environ))
        if token is None:
            raise KeyMissing(_UNKNOWN)
        return token


def _bearer(environ: "WSGIEnvironment") -> str:
    scheme, _, text = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    return text.strip() if scheme.lower() == "bearer" else ""
