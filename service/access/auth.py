"""Access control: which callers may use the service (tokens), and how often (rate limits)."""

import contextlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from registry.auth.bearer import bearer_token, require
from registry.auth.tokens import Right, Token, Tokens
from registry.core.errors import RateExceeded, TokensUnavailable
from registry.core.names import sha256_hex
from service.access.rate_limit import RateLimiter, parse_address
from service.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# The routes that need no token. If access control is on, all others do.
PUBLIC = frozenset(
    {
        *("docs.docs", "docs.openapi", "page.page", "static"),
        *("health.livez", "health.readyz"),
        *("mlflow_scoring.ping", "mlflow_scoring.health", "mlflow_scoring.version"),
        *("openinference.live", "openinference.server_ready", "openinference.model_ready"),
        "openinference.show_server",
    }
)
# The routes that a client reads before it classifies need either right. Routes that are neither
# here nor in ``PUBLIC`` need the right to view.
BOTH: tuple[Right, ...] = ("view", "classify")
FOR_CLIENTS = frozenset({"openinference.show_model", "openinference.show_config"})
# In a request's environment, once it was looked up: the token that the request sent, or None.
SENDER = "convoy.sender"


class AccessControl:
    """Admits requests, or raises the error to answer them with."""

    def __init__(self, settings: Settings) -> None:
        self._requires_token = settings.auth == "required"
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
        """Admit one classification, and count it against the caller's rate limit.

        Args:
            environ: of the request.
            again: the request was counted before, so it does not count a second time.

        Raises:
            TokenMissing: the request has no known token.
            TokenInsufficient: the token's role does not permit classification.
            TokensUnavailable: the file of tokens cannot be read.
            RateExceeded: the caller has sent too many requests.
        """
        caller = self._address(environ)
        if self._requires_token:
            token = require(self._token(environ), "classify")
            caller = f"token {token.name}"
        if self._rates is not None and not again and (wait_s := self._rates.take(caller)):
            after_s = math.ceil(wait_s)
            raise RateExceeded(f"rate limit exceeded; try again after {after_s} s", after_s)

    def admit_to_route(self, endpoint: str | None, environ: "WSGIEnvironment") -> None:
        """Admit a request that Flask answers, for the route ``endpoint``; None if it has no route.

        Raises:
            TokenMissing, TokenInsufficient, TokensUnavailable: as ``admit``.
        """
        if endpoint is not None and endpoint not in PUBLIC:
            self.admit_with(environ, BOTH if endpoint in FOR_CLIENTS else ("view",))

    def admit_with(self, environ: "WSGIEnvironment", rights: tuple[Right, ...]) -> None:
        """Admit a request that needs one of the ``rights``; all callers if there are none.

        Raises:
            TokenMissing, TokenInsufficient, TokensUnavailable: as ``admit``.
        """
        if not self._requires_token or not rights:
            return
        if sha256_hex(_sent_token(environ).encode()) == self._service_digest:
            return  # comparing digests, so that the time taken reveals nothing about the key
        token = self._token(environ)
        if not (token and any(token.may(right) for right in rights)):
            require(token, rights[0])

    def _address(self, environ: Mapping[str, Any]) -> str:
        """The client's address; behind a trusted proxy, the last entry of X-Forwarded-For."""
        peer: str = environ.get("REMOTE_ADDR", "")
        if self._proxies and (address := parse_address(peer)):
            last = environ.get("HTTP_X_FORWARDED_FOR", "").rpartition(",")[2].strip()
            client = parse_address(last)
            if client and any(address in network for network in self._proxies):
                return str(client)
        return peer

    def describe(self, environ: "WSGIEnvironment") -> tuple[str, str | None]:
        """A client's address, and its token's name or None, for the access log."""
        token = None
        if self._requires_token:
            with contextlib.suppress(TokensUnavailable):
                token = self._token(environ)
        return self._address(environ), token.name if token else None

    def _token(self, environ: "WSGIEnvironment") -> Token | None:
        """The token that a request sent, or None; looked up once for each request.

        Raises:
            TokensUnavailable: the file of tokens cannot be read.
        """
        if SENDER not in environ:
            environ[SENDER] = self._tokens.find(_sent_token(environ))
        token: Token | None = environ[SENDER]
        return token


def _sent_token(environ: Mapping[str, Any]) -> str:
    return bearer_token(environ.get("HTTP_AUTHORIZATION", ""))
