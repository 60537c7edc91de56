"""``CallThreads``, which answer gRPC calls, and ``Turns``, which let a few of them classify."""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any


class CallThreads(Executor):
    """An executor for ``grpc.server``. Its threads end with the process.

    grpcio receives a call's message in the thread that answers the call. With a few threads, a few
    clients that send slowly would keep out all others, and a few large images all probes. With many
    threads, the threads compete for the interpreter: 32 calls at a time took twice the CPU of four.
    So there are a few threads, and ``Receiver`` asks for one more for each slow call.
    """

    def __init__(self, number: int) -> None:
        """Start ``number`` threads."""
        self._number = number
        self._wanted = number
        self._running = 0
        self._lock = threading.Lock()
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.add(0)

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Answer a ``call`` in the next thread that is free."""
        future: Future[Any] = Future()

        def answer() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call(*args, **kwargs))
                except BaseException as error:  # noqa: BLE001 - the future has it
                    future.set_exception(error)

        self._calls.put(answer)
        return future

    def add(self, number: int) -> None:
        """Have ``number`` threads more than at first; threads in excess end after their call."""
        with self._lock:
            self._wanted = self._number + number
            while self._running < self._wanted:
                threading.Thread(target=self._answer_calls, name="grpc", daemon=True).start()
                self._running += 1

    def _answer_calls(self) -> None:
        while True:
            self._calls.get()()
            with self._lock:
                if self._running > self._wanted:
                    self._running -= 1
                    return


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

    def __exit__(self, *exception: object) -> None:
        self._free.release()
