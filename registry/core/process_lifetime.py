"""Ends a process together with its parent, and limits its privileges."""

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38  # prctl(2)


def end_with_parent(how: int = signal.SIGTERM) -> None:
    """Have the kernel send this process the signal ``how`` when the thread that started it ends.

    So no child process stays behind when its parent dies without ending it. Linux only; on other
    systems nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how)


def forbid_new_privileges() -> None:
    """Keep this process and its children from gaining rights through setuid files.

    Linux only; on other systems nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def end_with_standard_input() -> None:
    """Wait until the parent closes this process's standard input or dies, then end the process."""
    sys.stdin.buffer.read()
    os._exit(0)
