"""A closed-loop load: each connection sends its next request after an answer, which is checked.

    load(port, connections, seconds, questions)    # in a separate process

An answer is *right* if it has status 200 and names an expected label for every picture of the
request, in the form of the request's protocol. Requests/s count right answers only. Every other
outcome is counted by its kind and marks the row (``failures``). The client waits for requests that
are still open at the end, and counts their time, so that a server cannot hide that it stalled.

The client is a single loop over ``epoll``, because it shares the cores with the servers. The row's
``client_cores`` is the number of cores that it used.
"""

import errno
import re
import select
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import cycle
from pathlib import Path

import msgspec
import numpy as np

ROOT = Path(__file__).parent.parent
UNANSWERED_TIMEOUT_S = 30.0
RECONNECT_S = 0.1  # a pause, so that clients do not reconnect to a dead server in a tight loop
READ_BYTES = 262_144
FAILURES = ("refused", "wrong", "errors", "lost", "not_connected")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_BINARY_SIZE = re.compile(rb'"binary_data_size":(\d+)')
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)

Figures = dict[str, float]


class Question(msgspec.Struct, frozen=True):
    """One request, the right labels for each of its pictures, and the ``READERS`` of its answer."""

    data: bytes
    right: tuple[frozenset[str], ...]
    reader: str = "v1"


class _Prediction(msgspec.Struct):
    label: str


class _Predictions(msgspec.Struct):
    predictions: list[_Prediction]


class _Answer(msgspec.Struct):
    predictions: list[_Prediction] | None = None
    results: list[_Predictions] | None = None


class _Tensor(msgspec.Struct):
    name: str
    data: list[str | float] = []


class _Outputs(msgspec.Struct):
    outputs: list[_Tensor]


def _best_of_v1(body: bytes) -> list[str]:
    answer = msgspec.json.decode(body, type=_Answer)
    if answer.results is not None:
        return [each.predictions[0].label for each in answer.results]
    return [each.label for each in (answer.predictions or [])[:1]]


def _best_of_tensors(body: bytes) -> list[str]:
    """The labels of the Open Inference Protocol; in binary form they are the last tensor."""
    if sizes := _BINARY_SIZE.findall(body):
        labels, found = body[-int(sizes[-1]) :], []
        while labels:
            (length,) = struct.unpack_from("<I", labels)
            found.append(labels[4 : 4 + length].decode())
            labels = labels[4 + length :]
        return found
    outputs = msgspec.json.decode(body, type=_Outputs).outputs
    return [str(label) for each in outputs if each.name == "labels" for label in each.data]


def _best_of_rows(body: bytes) -> list[str]:
    """The labels of MLflow's scoring protocol."""
    return [each.label for each in msgspec.json.decode(body, type=_Predictions).predictions]


def _best_of_object(body: bytes) -> list[str]:
    """The first label of TorchServe's answer."""
    return list(msgspec.json.decode(body, type=dict[str, float]))[:1]


READERS = {
    "v1": _best_of_v1,
    "tensors": _best_of_tensors,
    "rows": _best_of_rows,
    "object": _best_of_object,
}
"""By name: functions that read the best label of each picture from the body of an answer."""


class _Load(msgspec.Struct):
    port: int
    connections: int
    seconds: float
    questions: list[Question]


def post(
    body: bytes,
    right: Iterable[frozenset[str]],
    content_type: str = "application/octet-stream",
    path: str = "/v1/classify",
    reader: str = "v1",
    header: str = "",
) -> Question:
    """A POST of ``body``, with the right labels for each picture; ``header`` is one more line."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\n"
        f"{header}Content-Length: {len(body)}\r\n\r\n"
    )
    return Question(head.encode() + body, tuple(right), reader)


def is_right(body: bytes, right: tuple[frozenset[str], ...], reader: str = "v1") -> bool:
    """Whether the best label of every picture in the answer is one of the right ones."""
    try:
        best = READERS[reader](body)
    except (msgspec.MsgspecError, IndexError, struct.error, UnicodeDecodeError):
        return False
    return len(best) == len(right) and all(map(frozenset.__contains__, right, best))


def failures(row: Figures) -> dict[str, int]:
    """The failures of a row by kind, which exclude it from comparisons; empty for a clean row."""
    return {kind: int(row[kind]) for kind in FAILURES if row[kind]}


def explain(row: Figures) -> str:
    """``12 refused, 3 wrong``, or an empty text for a clean row."""
    return ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in failures(row).items())


def load(port: int, connections: int, seconds: float, questions: list[Question]) -> Figures:
    """Run ``drive`` in a separate process, so that no work of this process delays it."""
    order = msgspec.json.encode(_Load(port, connections, seconds, questions))
    command = [sys.executable, "-m", "benchmarks.closed_loop"]
    done = subprocess.run(command, input=order, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    figures: Figures = msgspec.json.decode(done.stdout)
    return figures


def drive(port: int, connections: int, seconds: float, questions: list[Question]) -> Figures:
    """Send requests for ``seconds`` over ``connections``; times in ms are of right answers."""
    used = time.process_time()
    loop = _Loop(port, cycle(questions), seconds)
    loop.run(connections)
    client_s = time.process_time() - used
    # Without a right answer, the row is marked, and its times are only the time limit.
    times = np.array(loop.right_ms or [1000 * UNANSWERED_TIMEOUT_S])
    return {
        "rps": loop.right_in_time / seconds,
        "p50_ms": float(np.percentile(times, 50)),
        "p99_ms": float(np.percentile(times, 99)),
        "right": loop.outcomes["right"],
        **{kind: loop.outcomes[kind] for kind in FAILURES},
        "client_cores": client_s / seconds,
    }


class _Connection:
    """A socket, its current question, and the part of the answer that has arrived."""

    __slots__ = ("asked", "connected", "events", "question", "received", "socket", "unsent")

    def __init__(self, port: int) -> None:
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.connect_ex(("127.0.0.1", port))
        self.connected = False
        self.events = select.EPOLLOUT
        self.question: Question | None = None
        self.unsent = memoryview(b"")
        self.received = bytearray()
        self.asked = 0.0


class _Loop:
    def __init__(self, port: int, questions: Iterator[Question], seconds: float) -> None:
        self.outcomes: Counter[str] = Counter()
        self.right_ms: list[float] = []
        self.right_in_time = 0
        self._port = port
        self._questions = questions
        self._epoll = select.epoll()
        self._open: dict[int, _Connection] = {}
        self._reopen_at: list[float] = []
        self._end = time.perf_counter() + seconds

    def run(self, connections: int) -> None:
        for _ in range(connections):
            self._connect()
        while (now := time.perf_counter()) < self._end + UNANSWERED_TIMEOUT_S:
            if now >= self._end and not any(each.question for each in self._open.values()):
                break
            for number, events in self._epoll.poll(0.05):
                if (connection := self._open.get(number)) is not None:
                    self._handle(connection, events)
            self._reopen(time.perf_counter())
        for connection in list(self._open.values()):
            self._close(connection)
        self._epoll.close()

    def _connect(self) -> None:
        connection = _Connection(self._port)
        self._open[connection.socket.fileno()] = connection
        self._epoll.register(connection.socket, connection.events)

    def _reopen(self, now: float) -> None:
        due = [at for at in self._reopen_at if at <= now]
        self._reopen_at = [at for at in self._reopen_at if at > now]
        if now < self._end:
            for _ in due:
                self._connect()

    def _handle(self, connection: _Connection, events: int) -> None:
        try:
            if not connection.connected:
                self._begin(connection)
            elif events & select.EPOLLOUT:
                self._send(connection)
            if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                self._receive(connection)
        except OSError:
            self._fail(connection)

    def _begin(self, connection: _Connection) -> None:
        error = connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, errno.errorcode.get(error, ""))
        connection.connected = True
        self._ask(connection)

    def _ask(self, connection: _Connection) -> None:
        now = time.perf_counter()
        if now >= self._end:
            self._close(connection)
            return
        connection.question = next(self._questions)
        connection.asked = now
        connection.unsent = memoryview(connection.question.data)
        self._send(connection)

    def _send(self, connection: _Connection) -> None:
        try:
            sent = connection.socket.send(connection.unsent)
        except BlockingIOError:
            sent = 0
        connection.unsent = connection.unsent[sent:]
        events = select.EPOLLIN | (select.EPOLLOUT if connection.unsent else 0)
        if events != connection.events:
            connection.events = events
            self._epoll.modify(connection.socket, events)

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._fail(connection)
            return
        connection.received += data
        end = connection.received.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(connection.received, 0, end + 2)
        if length is None:
            raise SystemExit(
                f"an answer has no Content-Length: {bytes(connection.received[:300])!r}"
            )
        if len(connection.received) >= end + 4 + int(length[1]):
            self._settle(connection, end)

    def _settle(self, connection: _Connection, end: int) -> None:
        now = time.perf_counter()
        question = connection.question
        assert question is not None
        status = int(connection.received[9:12])
        if status in (429, 503):
            outcome = "refused"
        elif status != 200:
            outcome = "errors"
        elif is_right(bytes(connection.received[end + 4 :]), question.right, question.reader):
            outcome = "right"
            self.right_ms.append(1000 * (now - connection.asked))
            self.right_in_time += now <= self._end
        else:
            outcome = "wrong"
        self.outcomes[outcome] += 1
        is_closing = _CLOSE.search(connection.received, 0, end + 2) is not None
        connection.received.clear()
        connection.question = None
        if is_closing:
            self._close(connection)
            if now < self._end:
                self._connect()
        else:
            self._ask(connection)

    def _fail(self, connection: _Connection) -> None:
        """Count and close a connection that the server refused, closed or reset."""
        if connection.question is None and not connection.connected:
            self.outcomes["not_connected"] += 1
        self._close(connection)
        self._reopen_at.append(time.perf_counter() + RECONNECT_S)

    def _close(self, connection: _Connection) -> None:
        if connection.question is not None:
            self.outcomes["lost"] += 1
        self._open.pop(connection.socket.fileno(), None)
        connection.socket.close()


if __name__ == "__main__":
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=_Load)
    found = drive(order.port, order.connections, order.seconds, order.questions)
    sys.stdout.buffer.write(msgspec.json.encode(found))
