"""``routes_to_canary``: which version answers a request during a canary."""

import hashlib

from registry.model.refs import Canary

_ALL_DIGESTS = float(1 << 64)


def routes_to_canary(canary: Canary, key: bytes) -> bool:
    """Whether the challenger answers the requests with this ``key``.

    The answer depends on the key, the challenger's version and its share only, so it is the same in
    every worker and on every machine. A larger share adds keys and keeps those of a smaller one.
    """
    if not canary.share:
        return False
    digest = hashlib.sha256(b"%d:" % canary.version + key).digest()
    return int.from_bytes(digest[:8]) < canary.share * _ALL_DIGESTS
