"""Who may use the service and the control plane: bearer tokens, of which only digests are kept.

A token is 256 random bits, so a plain SHA-256 of it is as good as any slow hash, and a file of
digests tells nobody a token. Whether the file has changed is looked at at every request: what is
added or removed counts at once.
"""

import hmac
import logging
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from registry.core.errors import TokensUnavailable, UsageError
from registry.core.files import locked
from registry.core.names import MODEL_NAME, Sha256, sha256_hex

log = logging.getLogger(__name__)

Role = Literal["classify", "viewer", "admin"]
Right = Literal["classify", "view", "decide"]
RIGHTS: dict[Role, tuple[Right, ...]] = {
    "classify": ("classify",),
    "viewer": ("view",),
    "admin": ("classify", "view", "decide"),
}
PREFIX = "convoy_"


class Token(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A named token: ``classify`` may do that, ``viewer`` may look, ``admin`` all, and decide."""

    name: str
    role: Role
    sha256: Sha256
    made: str

    def may(self, right: Right) -> bool:
        return right in RIGHTS[self.role]


class Tokens:
    """The tokens in a file that only its owner may read."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: tuple[tuple[int, int, int] | None, tuple[Token, ...]] = None, ()

    def all(self) -> tuple[Token, ...]:
        """Every token, by name.

        Raises:
            UsageError: the file cannot be read.
        """
        try:
            stat = self._file.stat()
            trace = stat.st_mtime_ns, stat.st_size, stat.st_ino
            if trace == self._known[0]:
                return self._known[1]
            found = self._decode(self._file.read_bytes())
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise UsageError(f"the tokens in {self._file} cannot be read: {error}") from error
        tokens = tuple(sorted(found, key=lambda token: token.name))
        self._known = trace, tokens
        return tokens

    def add(self, name: str, role: Role) -> str:
        """Make a token and return it; it cannot be shown again.

        Raises:
            UsageError: there is one of that name, the name has other characters than those of
                a model's, or the file cannot be read or written.
        """
        if not MODEL_NAME.fullmatch(name):
            raise UsageError(f"{name!r} is no name: use 1 to 63 letters, digits, '_' or '-'")
        text = PREFIX + secrets.token_urlsafe(32)
        made = datetime.now(UTC).isoformat(timespec="seconds")
        fresh = Token(name=name, role=role, sha256=sha256_hex(text.encode()), made=made)

        def with_fresh(before: tuple[Token, ...]) -> tuple[Token, ...]:
            if any(token.name == name for token in before):
                raise UsageError(f"there is a token {name!r} already; remove it first")
            return *before, fresh

        self._change(with_fresh)
        return text

    def remove(self, name: str) -> None:
        """Have the token of that name open nothing from now on.

        Raises:
            UsageError: there is none of that name, or the file cannot be read or written.
        """

        def without(before: tuple[Token, ...]) -> tuple[Token, ...]:
            rest = tuple(token for token in before if token.name != name)
            if len(rest) == len(before):
                raise UsageError(f"there is no token {name!r}")
            return rest

        self._change(without)

    def find(self, text: str) -> Token | None:
        """The token that ``text`` is; raises as ``find_digest``."""
        return self.find_digest(sha256_hex(text.encode(errors="replace")))

    def find_digest(self, digest: str) -> Token | None:
        """The token of that SHA-256; every one is compared, in constant time.

        Raises:
            KeysUnavailable: the file cannot be read, which is not the caller's fault.
        """
        try:
            tokens = self.all()
        except UsageError as error:
            log.error("%s; nobody is let in", error)
            raise TokensUnavailable("keys cannot be checked now") from error
        found = None
        for token in tokens:
            if hmac.compare_digest(token.sha256, digest):
                found = token
        return found

    def _change(self, change: Callable[[tuple[Token, ...]], tuple[Token, ...]]) -> None:
        """Replace the tokens by what ``change`` makes of those in the file, under its lock."""
        try:
            with locked(self._file, mode=0o600) as file:
                data = file.read()
                before = self._decode(data) if data is not None else ()
                file.replace(msgspec.json.encode(change(before)) + b"\n")
        except OSError as error:
            raise UsageError(f"the tokens in {self._file} cannot be changed: {error}") from error

    def _decode(self, data: bytes) -> tuple[Token, ...]:
        try:
            return msgspec.json.decode(data, type=tuple[Token, ...])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise UsageError(f"the tokens in {self._file} cannot be read: {error}") from error
