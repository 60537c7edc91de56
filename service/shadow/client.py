"""``ShadowFeed``: sends a worker's samples to the shadow's process, and never waits.

It uses a non-blocking datagram socket. If the shadow's process is slow or does not run, the sample
is dropped and counted. So that process can neither delay a request nor make it fail.
"""

import socket
import weakref
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

# Linux lets an unprivileged socket buffer this much; a larger sample is dropped.
BUFFER_BYTES = 400_000
_encode = msgspec.msgpack.encode


class Sample(Struct, frozen=True, array_like=True):
    """An image that the champion has answered, for the challenger to score.

    ``image`` holds pixels, uint8 (H, W, C) in row-major order, if both versions preprocess images
    alike; otherwise the encoded bytes. ``index`` is the champion's most probable class.
    """

    model: str
    challenger: int
    index: int
    is_encoded: bool
    image: bytes


class ShadowFeed:
    """Sends samples to the shadow. Any thread may call any method."""

    def __init__(
        self, address: Path | None, on_dropped: Callable[[str, int, str, int], None]
    ) -> None:
        """``on_dropped`` is called with the model, the version, "dropped" and the number dropped.

        Without an ``address``, every sample is dropped.
        """
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
            except OSError:  # the queue is full, the sample too large, or no process listens
                pass
            else:
                return
        self._on_dropped(sample.model, sample.challenger, "dropped", 1)
