"""``CallThreads``: the threads that answer calls, which know how many calls wait for one."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class CallThreads(ThreadPoolExecutor):
    """A few threads: for small images, more of them only compete for the interpreter."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "grpc")
        self._counting = threading.Lock()
        self._current = threading.local()
        self.waiting = 0
        """How many calls have arrived and wait for a thread."""

    @property
    def arrived(self) -> float:
        """When the call of the current thread arrived, by ``time.perf_counter``."""
        arrived: float = self._current.arrived
        return arrived

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Have a thread call ``fn``; grpcio calls this when a call has arrived."""
        arrived = time.perf_counter()

        def answer() -> Any:
            with self._counting:
                self.waiting -= 1
            self._current.arrived = arrived
            return fn(*args, **kwargs)

        with self._counting:
            self.waiting += 1
        return super().submit(answer)
