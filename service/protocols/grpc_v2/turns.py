"""``Turns``: lets a few calls work at a time, and knows how many wait."""

import threading
from types import TracebackType


class Turns:
    """A context manager for the work of a call. Any thread may enter it."""

    def __init__(self, number: int) -> None:
        """Let ``number`` calls work at a time."""
        self._free = threading.Semaphore(number)
        self._counting = threading.Lock()
        self.waiting = 0
        """How many calls wait for their turn."""

    def __enter__(self) -> None:
        with self._counting:
            self.waiting += 1
        self._free.acquire()
        with self._counting:
            self.waiting -= 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._free.release()
