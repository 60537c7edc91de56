"""``BackgroundQueue``: rows that a thread handles later, so that a request only appends one."""

import logging
import time
from collections import deque
from collections.abc import Callable
from threading import Event, Thread
from typing import Generic, TypeVar

Row = TypeVar("Row")
log = logging.getLogger(__name__)

INTERVAL_S = 0.2
# The thread gives up the interpreter after this many rows, about a millisecond of work: the
# worker's loop would otherwise wait for the interpreter's switch interval, 5 ms.
CHUNK = 16
ERROR_INTERVAL_S = 60.0


class BackgroundQueue(Generic[Row]):
    """A queue of bounded length, and the thread that empties it. Any thread may ``put``."""

    def __init__(
        self,
        name: str,
        handle: Callable[[list[Row]], None],
        max_rows: int,
        dropped: Callable[[int], None],
    ) -> None:
        """Start the thread.

        Args:
            name: of the thread.
            handle: called in the thread, with at most ``CHUNK`` rows.
            max_rows: while this many rows wait, further ones are dropped.
            dropped: called in the thread, with how many rows were dropped since the last call.
        """
        self._handle = handle
        self._max_rows = max_rows
        self._dropped = dropped
        self._rows: deque[Row] = deque()
        self._lost = 0
        self._next_error = 0.0
        self._ending = Event()
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """How many rows wait."""
        return len(self._rows)

    def put(self, row: Row) -> None:
        """Queue ``row``, or count it as dropped. Never waits."""
        if len(self._rows) < self._max_rows:
            self._rows.append(row)
        else:
            self._lost += 1  # two threads that do this at once may count one row

    def close(self, timeout_s: float) -> None:
        """Handle the rows that still wait, for at most ``timeout_s``, and end the thread."""
        self._ending.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._ending.wait(INTERVAL_S):
            self._empty()
        self._empty()

    def _empty(self) -> None:
        while count := min(CHUNK, len(self._rows)):
            self._attempt([self._rows.popleft() for _ in range(count)])
            time.sleep(0)
        if lost := self._lost:
            try:
                self._dropped(lost)
            except Exception:  # noqa: BLE001 - the edge of a thread: the next round tries again
                return
            self._lost -= lost

    def _attempt(self, rows: list[Row]) -> None:
        try:
            self._handle(rows)
        except Exception:  # the edge of a thread: one bad row must not end it
            self._lost += len(rows)
            if (now := time.monotonic()) >= self._next_error:
                self._next_error = now + ERROR_INTERVAL_S
                log.exception("lost %d rows of %s", len(rows), self._thread.name)
