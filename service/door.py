"""Who may ask, and how often: keys, and a bucket of tokens for each caller.

The buckets lie in memory that all workers of a service share, 8 bytes a caller, so that a caller
has one however its connections are spread; nothing that a caller sends can make more of them.
Several machines have several buckets, unless they share a Redis (``service.shared_rate``).
"""

import hashlib
import ipaddress
import math
import mmap
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from registry.contract import sha256_hex
from registry.errors import KeyInsufficient, KeyMissing, RateExceeded
from registry.tokens import Token, Tokens
from service.settings import Settings
from service.shared_rate import SharedBuckets, Takes

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

BUCKETS = 8192
_UNKNOWN = "send a key that is known here: Authorization: Bearer …"


class Door:
    """Lets callers in; both methods raise what is to be answered instead."""

    def __init__(self, settings: Settings) -> None:
        self._asks_for_keys = settings.keys == "required"
        self._tokens = Tokens(settings.tokens)
        key = settings.service_key
        self._service_digest = sha256_hex(key.encode()) if key else None
        self._buckets = _buckets(settings)
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
        if self._buckets is not None and not again and (wait_s := self._buckets.take(caller)):
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
        """Whose the request is: the peer's, or whom a proxy of ours says that it speaks for."""
        peer = environ.get("REMOTE_ADDR", "")
        if self._proxies and (address := _parsed(peer)):
            told = _parsed(environ.get("HTTP_X_FORWARDED_FOR", "").rpartition(",")[2].strip())
            if told and any(address in network for network in self._proxies):
                return _network(str(told))
        return _network(peer)

    def _find(self, environ: "WSGIEnvironment") -> Token:
        token = self._tokens.find(_bearer(environ))
        if token is None:
            raise KeyMissing(_UNKNOWN)
        return token


def _buckets(settings: Settings) -> Takes | None:
    if settings.rate is None:
        return None
    own = Buckets(settings.rate, settings.burst, settings.run_folder)
    if settings.rate_store is None:
        return own
    return SharedBuckets(settings.rate_store, settings.rate, settings.burst, own)


class Buckets:
    """Generic cell rate algorithm (ITU-T I.371): of each caller, when its bucket will be full."""

    def __init__(self, rate: float, burst: int, folder: Path | None = None) -> None:
        """``rate`` a second, ``burst`` at once; shared by those who name the same ``folder``."""
        self._interval_ns = int(1e9 / rate)
        self._burst_ns = (burst - 1) * self._interval_ns
        if folder is None:
            descriptor, name = tempfile.mkstemp(prefix="convoy-buckets-")
            Path(name).unlink()
        else:
            descriptor = os.open(folder / "buckets", os.O_RDWR | os.O_CREAT, 0o600)
        size = 8 * (BUCKETS + 1)
        try:
            os.ftruncate(descriptor, size)
            self._full_at = memoryview(mmap.mmap(descriptor, size)).cast("q")
        finally:
            os.close(descriptor)
        # Behind the buckets lies what nobody outside knows, so that nobody can choose another's.
        if self._full_at[BUCKETS] == 0:
            self._full_at[BUCKETS] = secrets.randbits(62) + 1

    def take(self, caller: str) -> float:
        """0 if ``caller`` may ask now; else the seconds after which it may.

        Two workers may take at the same instant and count one of the two: the price of no lock.
        """
        salt = self._full_at[BUCKETS].to_bytes(8)
        digest = hashlib.blake2b(caller.encode(), digest_size=8, key=salt).digest()
        place = int.from_bytes(digest) % BUCKETS
        now = time.monotonic_ns()
        full_at = max(self._full_at[place], now)
        if (wait_ns := full_at - now - self._burst_ns) > 0:
            return wait_ns / 1e9
        self._full_at[place] = full_at + self._interval_ns
        return 0.0


def _network(caller: str) -> str:
    """An IPv6 caller's first 64 bits, of which it can choose the rest; any other as it is."""
    address = _parsed(caller)
    if address is None:
        return caller
    return str(address) if address.version == 4 else str(int(address) >> 64)


def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address in ``text``, a port behind it left out; an IPv4 one in IPv6's clothes as such."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _bearer(environ: "WSGIEnvironment") -> str:
    scheme, _, text = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    return text.strip() if scheme.lower() == "bearer" else ""
