"""What a process owes the one that started it."""

import contextlib
import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent(how: int = signal.SIGTERM) -> None:
    """Have the kernel send this process ``how`` when the thread that started it ends.

    So that nobody is left behind when a process dies without having ended its children. Linux only;
    elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how)
