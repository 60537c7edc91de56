"""An open-loop client that counts the result of every request, and draws the results over time.

It sends requests when they are due, whether or not answers are late, and counts times from then on.
So a server that stalls cannot hide it by getting fewer requests. Connections are kept, and opened
again when the server closes them, as in any client's pool. A request that was sent and never
answered is lost. A 200 with another label than expected is wrong. No request is sent twice.
"""

import asyncio
import http.client
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np

LOST, REFUSED, WRONG = 0, -1, -2
ANSWER_BYTES = 640
WAIT_TIMEOUT_S = 20.0
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_LABEL = re.compile(rb'"label":"[^"]*"')
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


class Ask(NamedTuple):
    """One request: its kind for the table, its bytes, and bytes that a right answer contains."""

    kind: str
    data: bytes
    expected: bytes = b""


class Row(NamedTuple):
    """The result of one request; times in seconds of ``perf_counter``.

    ``status`` is that of the answer, or ``LOST``, or ``REFUSED`` if the connection was refused, or
    ``WRONG`` for a 200 without the expected bytes. ``answer`` is the beginning of the answer.
    """

    kind: str
    due: float
    sent: float
    done: float
    status: int
    answer: bytes


def post(
    image: bytes,
    path: str = "/v1/classify?top_k=1",
    kind: str = "honest",
    expected: bytes = b"",
) -> Ask:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/octet-stream\r\nContent-Length: {len(image)}\r\n\r\n"
    )
    return Ask(kind, head.encode() + image, expected)


def honest(port: int, image: bytes) -> Ask:
    """A request to classify ``image`` that expects the label that the service answers now.

    Every version that answers during the load must give the same label.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_TIMEOUT_S)
    connection.request("POST", "/v1/classify?top_k=1", image)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    label = _LABEL.search(answer)
    if response.status != 200 or label is None:
        raise SystemExit(
            f"before the load, the service answered {response.status}: {answer[:500]!r}"
        )
    return post(image, expected=label[0])


def get(path: str, kind: str) -> Ask:
    return Ask(kind, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())


class Client(asyncio.Protocol):
    """One connection, which sends one request at a time."""

    def __init__(self, traffic: "Traffic") -> None:
        self._traffic = traffic
        self._data = bytearray()
        self._asked: tuple[Ask, float, float] | None = None
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._traffic.free.append(self)
        self._traffic.give()

    def ask(self, ask: Ask, due: float) -> None:
        self._asked = ask, due, time.perf_counter()
        self._transport.write(ask.data)

    def waits_since(self) -> float | None:
        return self._asked[2] if self._asked else None

    def data_received(self, data: bytes) -> None:
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        length = _LENGTH.search(self._data, 0, end + 2) if end > 0 else None
        if end < 0 or (length and len(self._data) < end + 4 + int(length[1])):
            return
        closing = _CLOSE.search(self._data, 0, end) is not None
        answer = bytes(self._data[:ANSWER_BYTES])
        self._data.clear()
        status = int(answer.split(b" ", 2)[1])
        expected = self._asked[0].expected if self._asked else b""
        self._settle(WRONG if status == 200 and expected not in answer else status, answer)
        if closing:
            self._transport.close()
        else:
            self._traffic.free.append(self)
            self._traffic.give()

    def eof_received(self) -> None:
        if self in self._traffic.free:
            self._traffic.free.remove(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.eof_received()
        self._traffic.open -= 1
        self._traffic.clients.discard(self)
        self._settle(LOST, b"")
        self._traffic.give()

    def abort(self) -> None:
        self._transport.abort()

    def _settle(self, status: int, answer: bytes) -> None:
        if self._asked is not None:
            ask, due, sent = self._asked
            self._asked = None
            self._traffic.rows.append(Row(ask.kind, due, sent, time.perf_counter(), status, answer))


class Traffic:
    """Sends the requests of ``choose``, ``rate`` per second; 0: each as soon as one is answered."""

    def __init__(
        self, port: int, choose: Callable[[], Ask], rate: float, connections: int = 16
    ) -> None:
        self.rows: list[Row] = []
        self.free: deque[Client] = deque()
        self.open = 0
        self.faults: list[tuple[float, str]] = []
        self.began = time.perf_counter()
        self._port = port
        self._choose = choose
        self._rate = rate
        self._endless = False  # True while it runs with a rate of 0
        self._connections = connections
        self._waiting: deque[tuple[Ask, float]] = deque()
        self.clients: set[Client] = set()
        self._connecting: set[asyncio.Task[None]] = set()

    def fault(self, name: str) -> None:
        """Mark this moment in the drawing as the start of the fault ``name``."""
        self.faults.append((time.perf_counter(), name))

    def give(self) -> None:
        if self._endless:
            now = time.perf_counter()
            self._waiting.extend((self._choose(), now) for _ in self.free)
        while self._waiting and self.free:
            self.free.popleft().ask(*self._waiting.popleft())
        while self.open < self._connections and len(self._connecting) < len(self._waiting):
            self.open += 1
            task = asyncio.ensure_future(self._connect())
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, client = await loop.create_connection(lambda: Client(self), "127.0.0.1", self._port)
        except OSError:
            self.open -= 1
            if self._waiting:
                ask, due = self._waiting.popleft()
                now = time.perf_counter()
                self.rows.append(Row(ask.kind, due, now, now, REFUSED, b""))
            return
        self.clients.add(client)

    @asynccontextmanager
    async def running(self) -> Any:
        """Send requests while the block runs, and then wait for the open ones."""
        stop = asyncio.Event()
        sending = asyncio.ensure_future(self._send(stop))
        try:
            yield self
        finally:
            stop.set()
            await sending

    async def _send(self, stop: asyncio.Event) -> None:
        started, count = time.perf_counter(), 0
        checked = started
        self._endless = not self._rate
        while not stop.is_set():
            now, due = time.perf_counter(), 0.0
            if self._rate:
                while (due := started + count / self._rate) <= now:
                    self._waiting.append((self._choose(), due))
                    count += 1
            elif len(self._waiting) + self._busy() < self._connections:
                missing = self._connections - len(self._waiting) - self._busy()
                self._waiting.extend((self._choose(), now) for _ in range(missing))
            self.give()
            if now - checked > 1:
                checked = now
                self._give_up(now)
            # Not more often than needed: the client takes CPU time from the service.
            await asyncio.sleep(min(max(due - now, 0.001), 0.01))
        self._endless = False
        deadline = time.perf_counter() + WAIT_TIMEOUT_S
        while (self._waiting or self._busy()) and time.perf_counter() < deadline:
            self.give()
            await asyncio.sleep(0.01)
        ended = time.perf_counter()
        while self._waiting:  # no connection will send these any more
            ask, due = self._waiting.popleft()
            self.rows.append(Row(ask.kind, due, ended, ended, LOST, b""))
        for client in list(self.clients):
            client.abort()
        await asyncio.sleep(0.1)

    def _busy(self) -> int:
        return sum(client.waits_since() is not None for client in self.clients)

    def _give_up(self, now: float) -> None:
        for client in self.clients:
            since = client.waits_since()
            if since is not None and now - since > WAIT_TIMEOUT_S:
                client.abort()


async def capacity(port: int, ask: Ask, seconds: float = 4.0, connections: int = 16) -> float:
    """Answers 200 per second if each connection sends again as soon as it is answered.

    Ends the benchmark if a request failed, because refusals do not count as capacity.
    """
    traffic = Traffic(port, in_turn([ask]), 0, connections)
    async with traffic.running():
        await asyncio.sleep(seconds)
    if failed(traffic.rows):
        raise SystemExit(f"the capacity cannot be measured: {summary(traffic.rows)}")
    settled = between(traffic.rows, traffic.began + 1, traffic.began + seconds, by="done")
    return sum(row.status == 200 for row in settled) / (seconds - 1)


def summary(rows: list[Row], kinds: tuple[str, ...] = ("honest",)) -> dict[str, Any]:
    """Counts of the requests of these kinds, and times in ms from when they were due."""
    chosen = [row for row in rows if row.kind in kinds]
    good_ms = [1000 * (row.done - row.due) for row in chosen if row.status == 200]
    refused_ms = [1000 * (row.done - row.due) for row in chosen if row.status == 503]
    figures: dict[str, Any] = {
        "requests": len(chosen),
        "ok": len(good_ms),
        "refused_503": len(refused_ms),
        "not_connected": sum(row.status == REFUSED for row in chosen),
        "lost": sum(row.status == LOST for row in chosen),
        "wrong": sum(row.status == WRONG for row in chosen),
        "other": sum(row.status not in (200, 503, LOST, REFUSED, WRONG) for row in chosen),
    }
    figures |= {f"{name}_ms": round(value, 2) for name, value in percentiles(good_ms).items()}
    if refused_ms:
        figures["p99_503_ms"] = round(float(np.percentile(refused_ms, 99)), 2)
    return figures


def failed(rows: list[Row], kinds: tuple[str, ...] = ("honest",)) -> int:
    """The number of requests of these kinds without a right answer of status 200."""
    return sum(row.status != 200 for row in rows if row.kind in kinds)


def percentiles(values_ms: list[float]) -> dict[str, float]:
    if not values_ms:
        return {}
    return {f"p{p}": float(np.percentile(values_ms, p)) for p in (50, 99)} | {
        "worst": max(values_ms)
    }


def between(rows: list[Row], start: float, end: float, by: str = "due") -> list[Row]:
    return [row for row in rows if start <= getattr(row, by) < end]


def draw(traffic: Traffic, file: Path, title: str, step_s: float = 0.5) -> None:
    """Draw the requests over time: their outcomes, how long they took, and the faults."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, began = traffic.rows, traffic.began
    edges = np.arange(0, max(row.done for row in rows) - began + step_s, step_s)
    figure, (counts, times) = plt.subplots(2, 1, figsize=(10, 5), sharex=True, layout="tight")
    groups: dict[str, tuple[str, Callable[[Row], bool]]] = {
        "200": ("tab:green", lambda row: row.status == 200),
        "4xx": ("tab:blue", lambda row: 400 <= row.status < 500),
        "503": ("tab:orange", lambda row: row.status == 503),
        "lost, or another 5xx": (
            "tab:red",
            lambda row: row.status <= 0 or (row.status >= 500 and row.status != 503),
        ),
    }
    for label, (colour, belongs) in groups.items():
        at = [row.done - began for row in rows if belongs(row)]
        if at or label.startswith(("200", "lost")):
            rate = np.histogram(at, edges)[0] / step_s
            counts.step(
                edges[:-1], rate, where="post", color=colour, label=f"{label} ({len(at):,})"
            )
    counts.set_ylabel("answers a second")
    counts.legend(loc="upper right", fontsize=8)
    counts.set_title(title)
    good = [row for row in rows if row.status == 200]
    places = np.digitize([row.due - began for row in good], edges) - 1
    taken_ms = np.array([1000 * (row.done - row.due) for row in good])
    for p, colour in ((50, "tab:green"), (99, "tab:purple")):
        line = [
            np.percentile(taken_ms[places == n], p) if (places == n).any() else np.nan
            for n in range(len(edges) - 1)
        ]
        times.step(edges[:-1], line, where="post", color=colour, label=f"p{p} of 200s")
    times.set_yscale("log")
    times.set_ylabel("ms from due")
    times.set_xlabel("seconds")
    times.legend(loc="upper right", fontsize=8)
    for when, name in traffic.faults:
        for axes in (counts, times):
            axes.axvline(when - began, color="grey", linewidth=0.6, alpha=0.7)
        if len(traffic.faults) <= 24:
            counts.text(when - began, counts.get_ylim()[1], name, fontsize=6, rotation=90, va="top")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def in_turn(asks: list[Ask]) -> Callable[[], Ask]:
    """A function that returns each of ``asks`` in turn, and then starts again."""

    def forever() -> Iterator[Ask]:
        while True:
            yield from asks

    return forever().__next__


@contextmanager
def in_thread(traffic: Traffic) -> Iterator[None]:
    """Send ``traffic`` while the block runs; afterwards all of its rows are there."""
    stop = Event()

    async def drive() -> None:
        async with traffic.running():
            await asyncio.to_thread(stop.wait)

    thread = Thread(target=lambda: asyncio.run(drive()))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
