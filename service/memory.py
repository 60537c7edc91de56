"""Memory that the allocator keeps for later, given back to the machine."""

import ctypes
from collections.abc import Callable


def _malloc_trim() -> Callable[[int], int]:
    try:
        found: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library
        return lambda keep: 0
    return found


_trim = _malloc_trim()


def give_back() -> None:
    """After a version or a large picture was let go: glibc keeps what was freed, many megabytes."""
    _trim(0)
