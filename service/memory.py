"""Memory that the allocator keeps for later, given back to the machine."""

import ctypes
import logging

log = logging.getLogger(__name__)


def give_back() -> None:
    """After a version was let go: glibc keeps what was freed, tens of megabytes a version."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        log.debug("this C library has no malloc_trim")
