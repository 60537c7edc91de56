"""Sessions of the control plane's pages. The server stores them, so it can end them.

A cookie holds 256 random bits and nothing else. A file maps the SHA-256 of the bits to the session.
So a cookie is worthless after the sign-out, and the file contains no cookie.
"""

import hmac
import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from registry.core.errors import TokensUnavailable
from registry.core.files import locked
from registry.core.names import Sha256, sha256_hex

log = logging.getLogger(__name__)

SESSION_TTL_S = 12 * 3600
MAX_SESSIONS = 1000
MAX_SESSIONS_OF_A_TOKEN = 20


class Session(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sign-in: the digest of its cookie, the digest of its token, and when it ends."""

    cookie_sha256: Sha256
    token_sha256: Sha256
    ends_unix_s: float


class Sessions:
    """The sessions in a file that only its owner may read."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def begin(self, token_sha256: str) -> str:
        """Sign the holder of a token in, and return the cookie.

        A token keeps only its newest ``MAX_SESSIONS_OF_A_TOKEN`` sessions, so that its holder
        cannot push out the sessions of other tokens.

        Raises:
            TokensUnavailable: the session cannot be written to the file.
        """
        cookie = secrets.token_urlsafe(32)
        fresh = Session(
            cookie_sha256=_digest(cookie),
            token_sha256=token_sha256,
            ends_unix_s=time.time() + SESSION_TTL_S,
        )
        self._change(lambda before: _with(before, fresh))
        return cookie

    def find(self, cookie: str) -> Session | None:
        """The session of a cookie; None if it was signed out, has expired or never existed."""
        try:
            data = self._file.read_bytes()
        except OSError:
            return None
        digest, now = _digest(cookie), time.time()
        for session in _decode(data):
            if hmac.compare_digest(session.cookie_sha256, digest) and now < session.ends_unix_s:
                return session
        return None

    def end(self, cookie: str) -> None:
        """Sign out: from now on the cookie is refused.

        Raises:
            TokensUnavailable: the file cannot be written; the cookie is still valid.
        """
        digest = _digest(cookie)
        self._change(lambda before: tuple(each for each in before if each.cookie_sha256 != digest))

    def _change(self, change: Callable[[tuple[Session, ...]], tuple[Session, ...]]) -> None:
        try:
            with locked(self._file, mode=0o600) as file:
                now = time.time()
                known = (each for each in _decode(file.read()) if now < each.ends_unix_s)
                file.replace(msgspec.json.encode(change(tuple(known))) + b"\n")
        except OSError as error:
            log.error("the sessions in %s cannot be changed: %s", self._file, error)
            raise TokensUnavailable(
                "sessions cannot be changed now; read the control plane's log for the reason"
            ) from error


def form_secret(cookie: str) -> str:
    """The secret that each form of the session must send. Pages of other sites cannot know it."""
    return hmac.digest(cookie.encode(errors="replace"), b"form", "sha256").hex()


def _with(before: tuple[Session, ...], fresh: Session) -> tuple[Session, ...]:
    """``before`` and ``fresh``, without the oldest sessions over either limit.

    The limit of the token is applied first, then the total.
    """
    own = [each for each in before if each.token_sha256 == fresh.token_sha256]
    ended = own[: 1 - MAX_SESSIONS_OF_A_TOKEN]
    return (*(each for each in before if each not in ended), fresh)[-MAX_SESSIONS:]


def _digest(cookie: str) -> str:
    return sha256_hex(cookie.encode(errors="replace"))


def _decode(data: bytes | None) -> tuple[Session, ...]:
    """The sessions in a file's content. A damaged file has none; the next sign-in replaces it."""
    try:
        return msgspec.json.decode(data, type=tuple[Session, ...]) if data is not None else ()
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        log.warning("the file of sessions cannot be read, so all are signed out: %s", error)
        return ()
