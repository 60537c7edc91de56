"""Rate limits: every caller has a token bucket, in memory that all workers of a service share.

The algorithm is the generic cell rate algorithm (ITU-T I.371): a bucket is stored as the time at
which it will be full again. The table has a fixed size, so callers cannot make it grow. Each entry
has its caller's fingerprint, so two callers never share a bucket. If all entries that a caller may
use are taken, the limiter reuses the one that is nearest to full. So under a flood of addresses it
admits some callers too often, but it never refuses one caller because of another.
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
"""An IPv6 site (/48) may send as many requests as this number of its networks (/64)."""

_WORDS = SETS * WAYS * 2
_FULL, _FINGERPRINT = 0, 1


class RateLimiter:
    """Admits ``rate`` requests a second per caller, after a first ``burst``; thread-safe."""

    def __init__(self, rate: float, burst: int, folder: Path | None = None) -> None:
        """Share the buckets with the limiters of all processes that use the same ``folder``."""
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
        # The last word is a secret salt. Without it, callers could choose their entries.
        if self._words[_WORDS] == 0:
            self._words[_WORDS] = secrets.randbits(63) + 1

    def take(self, caller: str) -> float:
        """Count one request of ``caller``, a token's name or an address.

        An IPv6 address counts for its /64 and, at ``SITE_CALLERS`` times the rate, for its /48. A
        caller can use any address of its /64, and a site any network of its /48.

        Returns:
            0.0 if the caller may send the request now, otherwise the seconds until it may. There is
            no lock, so two requests that two workers count at the same instant may count as one.
        """
        address = parse_address(caller)
        if address is None or address.version == 4:
            return self._take({caller if address is None else str(address): 1})
        site, network = (f"{int(address) >> (128 - bits):x}/{bits}" for bits in (48, 64))
        return self._take({network: 1, site: SITE_CALLERS})

    def _take(self, keys: dict[str, int]) -> float:
        """Count a request for every key if the limit of each, a multiple of the rate, allows it."""
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
        """The index of the entry of ``key``.

        If it has none, it gets the entry of its set that is nearest to full.
        """
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
    """The IP address in ``text``, without port and brackets; None if there is none.

    An IPv4 address written as IPv6 (``::ffff:192.0.2.1``) is returned as IPv4.
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
