"""Access control: which callers may use the service (tokens), and how often (rates)."""

import math
from typing import TYPE_CHECKING

from registry.auth.bearer import bearer_token, require
from registry.auth.tokens import Tokens
from registry.core.errors import RateExceeded
from registry.core.names import sha256_hex
from service.access.rate_limit import RateLimiter, parse_address
from service.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# The routes that ask for no token; all others do when access control is on.
PUBLIC = frozenset(
    {"docs.docs", "docs.openapi", "health.livez", "health.readyz", "page.page", "static"}
)


class AccessControl:
    """Lets callers in; both methods raise what is to be answered instead."""

    def __init__(self, settings: Settings) -> None:
        self._asks_for_keys = settings.auth == "required"
        self._tokens = Tokens(settings.tokens)
        key = settings.service_key
        self._service_digest = sha256_hex(key.encode()) if key else None
        self._rates = (
            RateLimiter(settings.rate_limit, settings.burst, settings.run_folder)
            if settings.rate_limit is not None
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
            token = require(self._tokens.find(_sent(environ)), "classify")
            caller = f"key {token.name}"
        if self._rates is not None and not again and (wait_s := self._rates.take(caller)):
            raise RateExceeded("you ask more often than you may", math.ceil(wait_s))

    def admit_to_route(self, endpoint: str | None, environ: "WSGIEnvironment") -> None:
        """A request for a route that Flask has, or for none; raises as ``admit``."""
        if not self._asks_for_keys or endpoint is None or endpoint in PUBLIC:
            return
        sent = _sent(environ)
        if sha256_hex(sent.encode()) == self._service_digest:
            return  # of digests, so that the time says nothing
        require(self._tokens.find(sent), "view")

    def _address(self, environ: "WSGIEnvironment") -> str:
        """The client's address; behind a trusted proxy, the last entry of X-Forwarded-For."""
        peer: str = environ.get("REMOTE_ADDR", "")
        if self._proxies and (address := parse_address(peer)):
            told = parse_address(environ.get("HTTP_X_FORWARDED_FOR", "").rpartition(",")[2].strip())
            if told and any(address in network for network in self._proxies):
                return str(told)
        return peer


def _sent(environ: "WSGIEnvironment") -> str:
    return bearer_token(environ.get("HTTP_AUTHORIZATION", ""))
