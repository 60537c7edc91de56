"""Sessions of the control plane's pages, which the server knows and can end.

A cookie holds 256 random bits and nothing else. What they stand for lies in a file, by the bits'
SHA-256, so a signed-out cookie opens nothing, and the file contains no cookie.
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
    """One sign-in: the digests of its cookie and of the token that was shown, and its end."""

    cookie_sha256: Sha256
    token_sha256: Sha256
    ends_unix_s: float


class Sessions:
    """The sessions in a file that only its owner may read."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def begin(self, token_sha256: str) -> str:
        """Sign the holder of a token in; the cookie.

        A token has ``MAX_SESSIONS_OF_A_TOKEN`` sessions at most: its newest. So one token cannot
        sign the holders of others out.

        Raises:
            KeysUnavailable: it cannot be written down.
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
        """The session of a cookie; None when it was signed out, has ended or never began."""
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
        """Sign out; from then on the cookie opens nothing.

        Raises:
            KeysUnavailable: it cannot be written down, and the cookie is as good as before.
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
            log.error("%s cannot be written: %s", self._file, error)
            raise TokensUnavailable(
                "sessions cannot be changed now; the control plane's log says why"
            ) from error


def form_secret(cookie: str) -> str:
    """What a form of the session must bring: a page of another site cannot know it."""
    return hmac.digest(cookie.encode(errors="replace"), b"form", "sha256").hex()


def _with(before: tuple[Session, ...], fresh: Session) -> tuple[Session, ...]:
    """``before`` and ``fresh``, less the oldest that are too many: of its token, then of all."""
    own = [each for each in before if each.token_sha256 == fresh.token_sha256]
    ended = own[: 1 - MAX_SESSIONS_OF_A_TOKEN]
    return (*(each for each in before if each not in ended), fresh)[-MAX_SESSIONS:]


def _digest(cookie: str) -> str:
    return sha256_hex(cookie.encode(errors="replace"))


def _decode(data: bytes | None) -> tuple[Session, ...]:
    """The sessions in a file's content; a damaged file has none, and the next sign-in mends it."""
    try:
        return msgspec.json.decode(data, type=tuple[Session, ...]) if data is not None else ()
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        log.warning("the sessions cannot be read, so all are signed out: %s", error)
        return ()
