"""Bearer tokens of the service and of the control plane. Only their digests are stored.

A token is 256 random bits, so a plain SHA-256 protects it as well as a slow hash would: a stolen
file of digests reveals no token. Every request checks whether the file has changed, so an added or
removed token takes effect at once.
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
    """A named token. ``role`` says what it permits, by ``RIGHTS``; ``made`` is an ISO 8601 time."""

    name: str
    role: Role
    sha256: Sha256
    made: str

    def may(self, right: Right) -> bool:
        """Whether the token's role permits ``right``, by ``RIGHTS``."""
        return right in RIGHTS[self.role]


class Tokens:
    """The tokens in a file that only its owner may read."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: tuple[tuple[int, int, int] | None, tuple[Token, ...]] = None, ()

    def all(self) -> tuple[Token, ...]:
        """All tokens, sorted by name.

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
        """Create a token and return its text, which cannot be shown again.

        Raises:
            UsageError: the name is taken, or is not like a model's name, or the file cannot be
                read or written.
        """
        if not MODEL_NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} is not a name for a token; use 1 to 63 letters, digits, '_' or '-', "
                "a letter or digit first"
            )
        text = PREFIX + secrets.token_urlsafe(32)
        made = datetime.now(UTC).isoformat(timespec="seconds")
        fresh = Token(name=name, role=role, sha256=sha256_hex(text.encode()), made=made)

        def with_fresh(before: tuple[Token, ...]) -> tuple[Token, ...]:
            if any(token.name == name for token in before):
                raise UsageError(f"there is already a token {name!r}; remove it first")
            return *before, fresh

        self._change(with_fresh)
        return text

    def remove(self, name: str) -> None:
        """Delete the token of that name: from now on it is refused.

        Raises:
            UsageError: there is no token of that name, or the file cannot be read or written.
        """

        def without(before: tuple[Token, ...]) -> tuple[Token, ...]:
            rest = tuple(token for token in before if token.name != name)
            if len(rest) == len(before):
                raise UsageError(f"there is no token {name!r}")
            return rest

        self._change(without)

    def find(self, text: str) -> Token | None:
        """The token whose text is ``text``, or None; raises as ``find_digest``."""
        return self.find_digest(sha256_hex(text.encode(errors="replace")))

    def find_digest(self, digest: str) -> Token | None:
        """The token with that SHA-256, or None. Compares with every token, in constant time.

        Raises:
            TokensUnavailable: the file cannot be read, which is not the client's fault.
        """
        try:
            tokens = self.all()
        except UsageError as error:
            log.error("%s; every token is refused until it can be read", error)
            raise TokensUnavailable("tokens cannot be checked now; try again later") from error
        found = None
        for token in tokens:
            if hmac.compare_digest(token.sha256, digest):
                found = token
        return found

    def _change(self, change: Callable[[tuple[Token, ...]], tuple[Token, ...]]) -> None:
        """Apply ``change`` to the tokens in the file, and write the result, under its lock."""
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
