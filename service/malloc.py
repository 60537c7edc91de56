"""Memory that the allocator keeps for later, given back to the machine."""

import ctypes

try:
    _libc: ctypes.CDLL | None = ctypes.CDLL("libc.so.6")
except OSError:  # another C library
    _libc = None

# From malloc.h.
M_ARENA_MAX = -8
ARENAS = 2


def share_heap() -> None:
    """Call before there are threads: glibc would give each a heap of its own, which it keeps.

    Of six thousand odd pictures, workers kept 36 and 40 MB so, with two heaps -1 to 34.
    """
    if _libc is not None:
        _libc.mallopt(M_ARENA_MAX, ARENAS)


def trim_heap() -> None:
    """After a version or a large picture was let go: glibc keeps what was freed, many megabytes."""
    if _libc is not None:
        _libc.malloc_trim(0)
