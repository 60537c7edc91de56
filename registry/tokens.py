"""Who may use the service and the control plane: bearer tokens, of which only digests are kept.

A token is 256 random bits, so a plain SHA-256 of it is as good as any slow hash, and a file of
digests tells nobody a token. Whether the file has changed is looked at at every request: what is
added or removed counts at once.
"""

import hmac
import logging
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from registry.contract import MODEL_NAME, Sha256, sha256_hex
from registry.errors import KeysUnavailable, UsageError
from registry.releases import write_atomically

log = logging.getLogger(__name__)

Role = Literal["classify", "viewer", "admin"]
PREFIX = "convoy_"


class Token(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A named token: ``classify`` may do that, ``viewer`` may look, ``admin`` all, and decide."""

    name: str
    role: Role
    sha256: Sha256
    made: str

    @property
    def may_classify(self) -> bool:
        return self.role != "viewer"

    @property
    def may_look(self) -> bool:
        return self.role != "classify"

    @property
    def may_decide(self) -> bool:
        return self.role == "admin"


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
            found = msgspec.json.decode(self._file.read_bytes(), type=tuple[Token, ...])
        except FileNotFoundError:
            return ()
        except (OSError, msgspec.MsgspecError, ValueError) as error:
            raise UsageError(f"the tokens in {self._file} cannot be read: {error}") from error
        tokens = tuple(sorted(found, key=lambda token: token.name))
        self._known = trace, tokens
        return tokens

    def add(self, name: str, role: Role) -> str:
        """Make a token and return it; it cannot be shown again.

        Raises:
            UsageError: there is one of that name, or the name has other characters than those of
                a model's.
        """
        if not MODEL_NAME.fullmatch(name):
            raise UsageError(f"{name!r} is no name: use 1 to 63 letters, digits, '_' or '-'")
        if any(token.name == name for token in self.all()):
            raise UsageError(f"there is a token {name!r} already; remove it first")
        text = PREFIX + secrets.token_urlsafe(32)
        made = datetime.now(UTC).isoformat(timespec="seconds")
        fresh = Token(name=name, role=role, sha256=sha256_hex(text.encode()), made=made)
        self._write((*self.all(), fresh))
        return text

    def remove(self, name: str) -> None:
        """Have the token of that name open nothing from now on."""
        rest = tuple(token for token in self.all() if token.name != name)
        if len(rest) == len(self.all()):
            raise UsageError(f"there is no token {name!r}")
        self._write(rest)

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
            raise KeysUnavailable("keys cannot be checked now") from error
        found = None
        for token in tokens:
            if hmac.compare_digest(token.sha256, digest):
                found = token
        return found

    def _write(self, tokens: tuple[Token, ...]) -> None:
        before = os.umask(0o077)
        try:
            write_atomically(self._file, msgspec.json.encode(tokens) + b"\n")
        finally:
            os.umask(before)
