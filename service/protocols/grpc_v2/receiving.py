"""``Receiver``: receives the messages of gRPC calls, however slowly clients send them."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from registry.core.errors import InvalidTensor, Overloaded
from service.memory import rss_mb
from service.protocols.grpc_v2.call_threads import CallThreads

log = logging.getLogger(__name__)

SLOW_AFTER_S = 0.02
"""A call that takes longer is slow."""

RETRY_AFTER_S = 1
PAUSE_S = 1.0


class _Call:
    """A call that a thread answers. ``began`` is a time of ``time.monotonic``."""

    def __init__(self, cancel: Callable[[], object]) -> None:
        self.began = time.monotonic()
        self._cancel = cancel
        self._lock = threading.Lock()
        self.is_arriving = True
        self.is_cancelled = False

    def arrive(self) -> None:
        """Note that the message has arrived, or will not; nothing cancels the call after that."""
        with self._lock:
            self.is_arriving = False

    def cancel(self) -> None:
        """End the call if its message has not arrived."""
        with self._lock:
            if self.is_arriving and not self.is_cancelled:
                self.is_cancelled = True
                self._cancel()


class Receiver:
    """Lets no slow call block the others, and bounds the memory of messages.

    grpcio does not tell how much of a message has arrived. While messages arrive slowly, the growth
    of the process since then is taken for their memory.
    """

    def __init__(
        self, threads: CallThreads, max_slow: int, max_bytes: int, max_growth_bytes: int
    ) -> None:
        """Receive in the ``threads``, which answer the calls.

        Args:
            threads: get one thread more for each slow call.
            max_slow: if more messages arrive slowly, the calls that have waited longest are
                cancelled.
            max_bytes: of the messages that have arrived and are not answered.
            max_growth_bytes: if the process grows by more while messages arrive slowly, the call
                that has waited longest is cancelled.
        """
        self._threads = threads
        self._max_slow = max_slow
        self._max_bytes = max_bytes
        self._max_growth_bytes = max_growth_bytes
        self._lock = threading.Lock()
        self._arrived_bytes = 0
        self._calls: dict[_Call, None] = {}  # the oldest first
        self._has_calls = threading.Event()
        threading.Thread(target=self._watch, name="grpc-receiver", daemon=True).start()

    @contextmanager
    def message(self, messages: Iterator[bytes], cancel: Callable[[], object]) -> Iterator[bytes]:
        """The one message of a call; it counts until the end of the ``with`` block.

        Args:
            messages: of the call.
            cancel: ends the call.

        Raises:
            InvalidTensor: the client has ended the call without a message.
            Overloaded: all messages together are too large, or this one arrived too slowly.
            grpc.RpcError: the client has given the call up.
        """
        call = _Call(cancel)
        self._calls[call] = None
        if not self._has_calls.is_set():
            self._has_calls.set()
        try:
            received = self._next(messages, call)
            with self._holding(len(received)):
                yield received
        finally:
            del self._calls[call]

    def _next(self, messages: Iterator[bytes], call: _Call) -> bytes:
        try:
            received = next(messages, None)
        except grpc.RpcError:
            received = None
            if not call.is_cancelled:
                raise
        finally:
            call.arrive()
        if call.is_cancelled:
            raise Overloaded("the message arrived too slowly; try again later", RETRY_AFTER_S)
        if received is None:
            raise InvalidTensor("the call has no message; send one")
        return received

    @contextmanager
    def _holding(self, size: int) -> Iterator[None]:
        with self._lock:
            if self._arrived_bytes and self._arrived_bytes + size > self._max_bytes:
                raise Overloaded(
                    f"messages of {self._arrived_bytes:,} bytes are waiting; try again later",
                    RETRY_AFTER_S,
                )
            self._arrived_bytes += size
        try:
            yield
        finally:
            with self._lock:
                self._arrived_bytes -= size

    def _watch(self) -> None:
        """Add threads for slow calls, and cancel some whose messages take too much."""
        while True:
            self._has_calls.wait()
            self._has_calls.clear()
            before_mb: int | None = None
            while self._calls:
                time.sleep(SLOW_AFTER_S)
                try:
                    before_mb = self._check_slow(before_mb)
                except Exception:  # the edge of a thread: a lack of descriptors must not end it
                    log.exception("cannot check slow gRPC calls")
                    time.sleep(PAUSE_S)

    def _check_slow(self, before_mb: int | None) -> int:
        """Check once; takes and returns the size of the process before messages were slow."""
        began_before = time.monotonic() - SLOW_AFTER_S
        slow = [each for each in list(self._calls) if each.began < began_before]
        self._threads.add(len(slow))
        arriving = [each for each in slow if each.is_arriving]
        now_mb = rss_mb()
        if before_mb is None or not arriving:
            before_mb = now_mb
        is_large = (now_mb - before_mb) << 20 > self._max_growth_bytes
        for each in arriving[: max(len(arriving) - self._max_slow, is_large)]:
            each.cancel()
        return before_mb
