"""Which version answers a request while a challenger is on trial."""

import hashlib

from registry.model.refs import Canary

_WHOLE = float(1 << 64)


def routes_to_canary(canary: Canary, key: bytes) -> bool:
    """Whether the challenger answers the requests of ``key``.

    The same for the same key, in every worker and on every machine, as long as the same version is
    on trial; a larger share takes further keys and keeps those it had.
    """
    if not canary.share:
        return False
    digest = hashlib.sha256(b"%d:" % canary.version + key).digest()
    return int.from_bytes(digest[:8]) < canary.share * _WHOLE
