"""``Receiver``: receives the messages of gRPC calls, however slowly clients send them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from msgspec import Struct

from registry.core.errors import InvalidTensor, Overloaded
from service.memory import rss_mb
from service.protocols.grpc_v2.call_threads import CallThreads

SLOW_AFTER_S = 0.02
"""A call that takes longer is slow."""

RETRY_AFTER_S = 1


class _Call(Struct, eq=False):
    """A call that a thread answers.

    Attributes:
        cancel: ends the call; None after its message has arrived.
        began: when the thread began with it, by ``time.monotonic``.
    """

    cancel: Callable[[], object] | None
    began: float


class Receiver:
    """Lets no slow call block the others, and bounds the memory of messages.

    grpcio does not tell how much of a message has arrived. While messages arrive slowly, the growth
    of the process since then is taken for their memory.
    """

    def __init__(self, threads: CallThreads, max_slow: int, max_bytes: int) -> None:
        """Receive in the ``threads``, which answer the calls.

        Args:
            threads: get one thread more for each slow call.
            max_slow: if more messages arrive slowly, the calls that have waited longest are
                cancelled.
            max_bytes: of the messages that have arrived and are not answered; also of those that
                arrive slowly.
        """
        self._threads = threads
        self._max_slow = max_slow
        self._max_bytes = max_bytes
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
            Overloaded: all messages together are too large.
            grpc.RpcError: the call has been cancelled, by the client or for its slowness.
        """
        call = _Call(cancel, time.monotonic())
        self._calls[call] = None
        if not self._has_calls.is_set():
            self._has_calls.set()
        try:
            received = next(messages, None)
            if received is None:
                raise InvalidTensor("the call has no message; send one")
            call.cancel = None
            with self._holding(len(received)):
                yield received
        finally:
            del self._calls[call]

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
            before_mb = rss_mb()
            while self._calls:
                time.sleep(SLOW_AFTER_S)
                began_before = time.monotonic() - SLOW_AFTER_S
                slow = [each for each in list(self._calls) if each.began < began_before]
                self._threads.add(len(slow))
                arriving = [cancel for each in slow if (cancel := each.cancel)]
                grown_mb = rss_mb() - before_mb
                if not arriving:
                    before_mb += grown_mb
                is_large = grown_mb << 20 > self._max_bytes
                for cancel in arriving[: max(len(arriving) - self._max_slow, is_large)]:
                    cancel()
