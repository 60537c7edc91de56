"""``RequestPools``: the threads for requests that the loop does not answer itself.

A few threads answer long requests, as many those with large bodies, and two pages and metrics.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gunicorn.workers.gthread import PollableMethodQueue
from msgspec import Struct

from service.server.pending_response import PendingResponse, failure
from service.server.protocol import Postpone

# The threads for metrics and pages; together they use at most this share of one core.
BACKGROUND_THREADS = 2
BACKGROUND_SHARE = 0.25
MAX_PAUSE_S = 1.0
MAX_WAITING = 512
# Longer bodies have their own threads, because decoding them would delay other requests.
LARGE_POOL_BYTES = 1024 * 1024


Finish = Callable[[PendingResponse, BaseException | None], None]
"""Called with a request whose answer is complete, and the error that ended it, if one did."""


class RequestPool(Struct):
    """The threads for one kind of request.

    ``count`` requests wait or are worked on, and their bodies have ``size`` bytes in total. While
    more than one waits, each thread works for only ``share`` of the time.
    """

    threads: ThreadPoolExecutor
    share: float = 1.0
    count: int = 0
    size: int = 0


class RequestPools:
    """The threads for postponed requests. The loop's thread uses it, and reads ``done``."""

    def __init__(self, threads: int) -> None:
        """Prepare the pools for long work and for large bodies with ``threads`` threads each."""
        self._postponed = RequestPool(ThreadPoolExecutor(threads, "work"))
        self._large = RequestPool(ThreadPoolExecutor(threads, "large"))
        background = ThreadPoolExecutor(BACKGROUND_THREADS, "background")
        self._background = RequestPool(background, BACKGROUND_SHARE / BACKGROUND_THREADS)
        self.queued = 0
        """Requests for which later ones will wait (``Postpone.queues``)."""
        self.done = PollableMethodQueue()
        self.done.init()

    @property
    def waiting(self) -> int:
        """How many requests wait for a thread or have one, without pages and metrics."""
        return self._postponed.count + self._large.count

    @property
    def size(self) -> int:
        """The bytes of the bodies of all requests that wait or are worked on."""
        return sum(pool.size for pool in (self._postponed, self._large, self._background))

    def choose(self, size: int, postponed: Postpone) -> RequestPool | None:
        """The pool for a postponed request with a body of ``size`` bytes; None if it is full."""
        pool = self._large if size > LARGE_POOL_BYTES else self._postponed
        if postponed.background:
            pool = self._background
        return pool if pool.count < MAX_WAITING else None

    def submit(
        self, pending: PendingResponse, pool: RequestPool, application: Any, finish: Finish
    ) -> None:
        """Have a thread call the WSGI ``application``; the loop then calls ``finish``."""
        size, queues = pending.size, pending.queues
        pool.count += 1
        pool.size += size
        self.queued += queues

        def answer() -> None:
            pending.call(application)
            pending.iterate()

        def done(error: BaseException | None) -> None:
            pool.count -= 1
            pool.size -= size
            self.queued -= queues
            finish(pending, error)

        def work() -> None:
            began = time.thread_time()
            error = failure(answer)
            self.done.defer(done, error)
            if pool.share < 1 and pool.count > 1:
                used_s = time.thread_time() - began
                time.sleep(min(MAX_PAUSE_S, used_s / pool.share - used_s))

        pool.threads.submit(work)

    def stop(self) -> None:
        """Start no further request; threads that work go on."""
        for pool in (self._postponed, self._large, self._background):
            pool.threads.shutdown(wait=False, cancel_futures=True)
