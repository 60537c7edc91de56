"""Request rates: every caller has a bucket, in memory that all workers of a service share.

The algorithm is the generic cell rate algorithm (ITU-T I.371): a bucket is the time at which it
will be full again. The table has a fixed size, so a caller cannot make it grow. Each entry carries
its caller's fingerprint, so two callers never share a bucket. When all entries that a caller may
use are taken, the limiter forgets the one that is nearest to full: under a flood of addresses it
admits some callers too often, and it refuses no caller for what another one did.
"""

import hashlib
import ipaddress
import mmap
import os
import secrets
import tempfile
import time
from pathlib import Path

SETS, WAYS = 8192, 8
"""A caller's bucket is in one of ``WAYS`` entries of its set: 65,536 buckets, 1 MiB."""

SITE_CALLERS = 16
"""An IPv6 site (/48) may ask as often as so many of its networks (/64)."""

_WORDS = SETS * WAYS * 2
_FULL, _FINGERPRINT = 0, 1


class RateLimiter:
    """Buckets of ``rate`` requests a second after a first ``burst``; safe from any thread."""

    def __init__(self, rate: float, burst: int, folder: Path | None = None) -> None:
        """The limiters of all processes that name the same ``folder`` share their buckets."""
        self._interval_ns = int(1e9 / rate)
        self._burst = burst
        if folder is None:
            descriptor, name = tempfile.mkstemp(prefix="convoy-buckets-")
            Path(name).unlink()
        else:
            descriptor = os.open(folder / "buckets", os.O_RDWR | os.O_CREAT, 0o600)
        size = 8 * (_WORDS + 1)
        try:
            os.ftruncate(descriptor, size)
            self._words = memoryview(mmap.mmap(descriptor, size)).cast("Q")
        finally:
            os.close(descriptor)
        # The last word is a secret key: without it, callers could choose their entries.
        if self._words[_WORDS] == 0:
            self._words[_WORDS] = secrets.randbits(63) + 1

    def take(self, caller: str) -> float:
        """Count one request of ``caller``, a token's name or an address.

        An IPv6 address counts for its /64 and, at ``SITE_CALLERS`` times the rate, for its /48: one
        caller can choose any address of the first, and one site any network of the second.

        Returns:
            0.0 when the caller may ask now, else the seconds after which it may. Two workers that
            count at the same instant may count one of the two: the price of no lock.
        """
        address = parse_address(caller)
        if address is None or address.version == 4:
            return self._take({caller if address is None else str(address): 1})
        site, network = (f"{int(address) >> (128 - bits):x}/{bits}" for bits in (48, 64))
        return self._take({network: 1, site: SITE_CALLERS})

    def _take(self, keys: dict[str, int]) -> float:
        """Count for every key, at so many times the rate and burst, if none of them refuses."""
        now = time.monotonic_ns()
        full: dict[int, int] = {}
        for key, times in keys.items():
            interval_ns = self._interval_ns // times
            entry = self._find(key, now)
            full_at = max(self._words[entry + _FULL], now)
            if (wait_ns := full_at - now - (self._burst * times - 1) * interval_ns) > 0:
                return wait_ns / 1e9
            full[entry] = full_at + interval_ns
        for entry, full_at in full.items():
            self._words[entry + _FULL] = full_at
        return 0.0

    def _find(self, key: str, now: int) -> int:
        """The index of the entry of ``key``: its own, or the one of its set nearest to full."""
        salt = self._words[_WORDS].to_bytes(8)
        digest = hashlib.blake2b(key.encode(), digest_size=16, key=salt).digest()
        fingerprint = int.from_bytes(digest[:8])
        first = int.from_bytes(digest[8:]) % SETS * WAYS * 2
        entries = range(first, first + 2 * WAYS, 2)
        for entry in entries:
            if self._words[entry + _FINGERPRINT] == fingerprint:
                return entry
        entry = min(entries, key=lambda each: self._words[each + _FULL])
        self._words[entry + _FULL] = now
        self._words[entry + _FINGERPRINT] = fingerprint
        return entry


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address in ``text``, without a port or brackets; None where there is none.

    An IPv4 address that a socket for both families shows as IPv6 is returned as IPv4.
    """
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
