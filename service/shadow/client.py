"""From a worker to the process that scores in the shadow: sent at once, or not at all.

A datagram socket whose sender never waits: when the other end is slow, or is not there, the sample
is dropped and counted. So nothing that happens over there can hold up or fail a request.
"""

import socket
import weakref
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

# What Linux lets an unprivileged socket buffer: a larger sample could never be sent.
BUFFER_BYTES = 400_000
_encode = msgspec.msgpack.encode


class Sample(Struct, frozen=True, array_like=True):
    """An image that the champion has answered, for the challenger to score.

    ``image`` are its pixels, uint8 (H, W, C) in row-major order, if the two see pictures alike,
    else its encoded bytes. ``index`` is the class that the champion found most probable.
    """

    model: str
    challenger: int
    index: int
    is_encoded: bool
    image: bytes


class ShadowFeed:
    """Sends samples; every method may be called from any thread."""

    def __init__(
        self, address: Path | None, on_dropped: Callable[[str, int, str, int], None]
    ) -> None:
        """``on_dropped`` is told the model, the version, ``dropped`` and how many were."""
        self._address = str(address) if address else None
        self._on_dropped = on_dropped
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        weakref.finalize(self, self._socket.close)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)

    def send(self, sample: Sample) -> None:
        """Send ``sample``, or count it as dropped."""
        if self._address is not None:
            try:
                self._socket.sendto(_encode(sample), self._address)
            except OSError:  # its queue is full, it is too large, or nobody listens
                pass
            else:
                return
        self._on_dropped(sample.model, sample.challenger, "dropped", 1)
