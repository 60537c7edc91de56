"""The process that makes the spans of all workers, and sends them to the collector.

A worker's own thread would need a quarter of the worker's time if every request were sampled, and
would hold the interpreter while the loop waits for it (docs/decisions/0023).
"""

import contextlib
import logging.config
import math
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec

from registry.core.errors import UsageError
from service.observability.logging import logging_config
from service.observability.metrics import Metrics
from service.observability.request_record import RequestRecord
from service.observability.tracing.options import TracingOptions
from service.observability.tracing.span_export import SpanExport
from service.observability.tracing.tracer import BUFFER_BYTES

# The supervisor kills this process 5 s after it has closed its standard input. Until then, the last
# records have this long to find room in the SDK's queue, and then the spans this long to be sent.
ROOM_TIMEOUT_S = 1.0
CLOSE_TIMEOUT_S = 3.0
_decode = msgspec.msgpack.Decoder(list[RequestRecord]).decode


def main(address: str) -> None:
    """Send the spans of the records that arrive at ``address`` until standard input ends."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # workers that end send records until the end
    logging.config.dictConfig(
        logging_config((os.environ.get("CONVOY_LOG_LEVEL") or "INFO").upper())
    )
    options = TracingOptions.from_environment(os.environ)
    if options is None:
        raise UsageError("this process needs OTEL_EXPORTER_OTLP_ENDPOINT")
    export = SpanExport(options, Metrics().families.traces_dropped.inc)
    with receiver_at(Path(address)) as receiver:
        relay(receiver, sys.stdin.fileno(), export)
    export.close(CLOSE_TIMEOUT_S)
    sys.stdout.flush()
    os._exit(0)  # a thread of the SDK may still wait for a collector that hangs


def receiver_at(address: Path) -> socket.socket:
    """A datagram socket at ``address``, in place of that of an earlier process."""
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.setblocking(False)
    address.unlink(missing_ok=True)
    receiver.bind(str(address))
    return receiver


class End:
    """Tells whether this process must end: the supervisor then closes its standard input."""

    def __init__(self, standard_input: int) -> None:
        """``standard_input`` is a file descriptor; nothing else may read from it."""
        self._standard_input = standard_input
        self._waits_until = math.inf

    def has_come(self) -> bool:
        """Whether standard input has ended."""
        if self._waits_until == math.inf:
            readable, _, _ = select.select([self._standard_input], [], [], 0)
            if readable and not os.read(self._standard_input, 1):
                self._waits_until = time.monotonic() + ROOM_TIMEOUT_S
        return self._waits_until < math.inf

    def forbids_waiting(self) -> bool:
        """Whether standard input ended more than ``ROOM_TIMEOUT_S`` ago."""
        return self.has_come() and time.monotonic() >= self._waits_until


def relay(receiver: socket.socket, standard_input: int, export: SpanExport) -> None:
    """Hand the records of all datagrams to ``export``; return when standard input has ended.

    The workers have ended by then, and the socket holds all records that they have sent.
    """
    end = End(standard_input)
    ended = False
    while not ended:
        select.select([receiver.fileno(), standard_input], [], [])
        ended = end.has_come()
        with contextlib.suppress(BlockingIOError):
            while data := receiver.recv(BUFFER_BYTES):
                export.send(_decode(data), end.forbids_waiting)


if __name__ == "__main__":
    main(sys.argv[1])
