"""What a process owes the one that started it."""

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38  # prctl(2)


def end_with_parent(how: int = signal.SIGTERM) -> None:
    """Have the kernel send this process ``how`` when the thread that started it ends.

    So that nobody is left behind when a process dies without having ended its children. Linux only;
    elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how)


def forbid_new_privileges() -> None:
    """Have the kernel give this process and its children no more rights by setuid files.

    Linux only; elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def end_with_standard_input() -> None:
    """End this process when whoever started it, and holds its standard input, lets go or dies."""
    sys.stdin.buffer.read()
    os._exit(0)
