"""``AccessLog``: one JSON line on stderr for each request, in the form of the other log lines.

A thread writes the lines. It encodes them with msgspec, because the loggers would take 47
microseconds for each line, which is a tenth of the CPU time of a small request; this takes 4.
"""

import os
import select
import time
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec
from msgspec import Struct

from service.observability.background_queue import BackgroundQueue
from service.observability.request_record import RequestRecord

STDERR = 2
MAX_LINES = 10_000
# In a line, a control character takes six bytes. With the other members, a line has less than
# ``PIPE_BUF`` bytes.
MAX_PATH_BYTES = 1500
MAX_NAME_BYTES = 600
_encode = msgspec.json.Encoder().encode


class Line(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line. Its members ``event``, ``level``, ``logger`` and ``timestamp`` are in every log.

    It has many fields because operators look for requests by each of them.
    """

    event: str
    level: str
    logger: str
    method: str | None = None
    path: str | None = None
    status: int | None = None
    duration_ms: float | None = None
    request_bytes: int | None = None
    response_bytes: int | None = None
    model_name: str | None = None
    model_version: int | None = None
    protocol: str | None = None
    client: str | None = None
    token: str | None = None
    request_id: str | None = None
    trace_id: str | None = None
    lost: int | None = None
    timestamp: datetime


class AccessLog:
    """Writes the lines of finished requests. Any thread may queue one."""

    def __init__(self, write: Callable[[bytes], object] | None = None) -> None:
        """``write``: takes some complete lines; by default it writes them to stderr."""
        self._write = write or _write_to_stderr
        self.queue: BackgroundQueue[RequestRecord | Line] = BackgroundQueue(
            "access log", self._write_lines, MAX_LINES, self._say_lost
        )

    def refused(self, client: str, status: int, response_bytes: int, request_id: str) -> None:
        """Queue the line of a request that the server refused itself, often before it was read."""
        self.queue.put(
            Line(
                event="request",
                level="info",
                logger=__name__,
                status=status,
                response_bytes=response_bytes,
                client=client,
                request_id=request_id,
                timestamp=datetime.now(UTC),
            )
        )

    def _write_lines(self, rows: list[RequestRecord | Line]) -> None:
        """Write the lines in pieces that other processes' lines cannot interrupt (``PIPE_BUF``)."""
        piece = b""
        for row in rows:
            line = _encode(row if isinstance(row, Line) else line_of(row)) + b"\n"
            if piece and len(piece) + len(line) > select.PIPE_BUF:
                self._write(piece)
                piece = b""
            piece += line
        self._write(piece)

    def _say_lost(self, count: int) -> None:
        """Write how many requests got no line, because too many lines waited."""
        now = datetime.now(UTC)
        line = Line(event="lines lost", level="warning", logger=__name__, lost=count, timestamp=now)
        self._write(_encode(line) + b"\n")


def line_of(record: RequestRecord) -> Line:
    """The line of a finished request."""
    request = record.request
    # WSGI has the bytes of a path as latin-1 (PEP 3333).
    path = request.path.encode("latin-1", "replace").decode("utf-8", "replace")
    since_s = time.perf_counter() - record.ended
    return Line(
        event="request",
        level="info",
        logger=__name__,
        method=request.method,
        path=_within(path, MAX_PATH_BYTES),
        status=request.status,
        duration_ms=round((record.ended - request.started) * 1000, 3),
        request_bytes=request.request_bytes,
        response_bytes=request.response_bytes,
        model_name=record.model_name and _within(record.model_name, MAX_NAME_BYTES),
        model_version=record.model_version,
        protocol=request.protocol or None,
        client=record.client,
        token=record.token,
        request_id=request.request_id,
        trace_id=record.trace.trace_id or None,
        timestamp=datetime.fromtimestamp(time.time() - since_s, UTC),
    )


def _within(text: str, size_bytes: int) -> str:
    """The beginning of ``text`` that takes at most ``size_bytes`` as JSON."""
    while len(_encode(text)) - len('""') > size_bytes:
        text = text[: len(text) * 9 // 10]
    return text


def _write_to_stderr(data: bytes) -> None:
    while data:
        data = data[os.write(STDERR, data) :]
