"""Scenarios 14 to 17, and 19: many connections that each send a few bytes, with default settings.

Honest clients send requests at a steady rate. Probes open a new connection each time, as a
kubelet's do. The attackers run in a separate process, because their work would otherwise add to the
times that this process measures for honest clients.
"""

import asyncio
import contextlib
import itertools
import multiprocessing
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.chaos.stack import paths_of_two, service
from benchmarks.common import RunningService
from benchmarks.traffic import LOST, Row, Traffic, between, failed, get, in_turn, post, summary
from service.settings import Settings

HONEST_RPS = 200
PROBES_RPS = 10
QUIET_S = 5
SECONDS = 20
JSON_CLIENTS = 8
PART_CLIENTS = 64
STALLED_CLIENTS = 1050
METRICS_CLIENTS = 300
BOUNDARY = "b"
JSON = "application/json"


def large_json(seconds: int = SECONDS) -> tuple[dict[str, Any], Traffic]:
    """Eight clients post JSON of 64 MB, and of the largest accepted size, to two workers."""
    return _play(partial(_post_again, JSON_CLIENTS, _large_json_requests), seconds)


def large_tensors(seconds: int = SECONDS) -> tuple[dict[str, Any], Traffic]:
    """Eight clients post large tensors and tables that fit no version, to two workers."""
    return _play(partial(_post_again, JSON_CLIENTS, _large_tensor_requests), seconds)


def empty_parts(seconds: int = SECONDS) -> tuple[dict[str, Any], Traffic]:
    """64 clients post 64 KB of empty multipart parts, again and again."""
    return _play(partial(_post_again, PART_CLIENTS, _empty_part_requests), seconds)


def stalled_bodies(seconds: int = SECONDS) -> tuple[dict[str, Any], Traffic]:
    """1,050 connections announce 64 MB and then send nothing; a closed one is opened again."""
    return _play(partial(_stall, STALLED_CLIENTS), seconds)


def many_scrapes(seconds: int = SECONDS) -> tuple[dict[str, Any], Traffic]:
    """300 connections request /metrics again as soon as they are answered."""
    return _play(partial(_post_again, METRICS_CLIENTS, _metrics_requests), seconds)


def _large_json_requests() -> list[bytes]:
    allowed = Settings().max_json_bytes
    bodies = [
        _json(64_000_000, b'"ab"'),
        _json(63_000_000, b'"' + b"A" * 62_999_980 + b'"'),
        _json(allowed - 100, b'"ab"'),
        _json(allowed - 100, b'"' + b"A" * (allowed // 4 * 4 - 200) + b'"'),
    ]
    return [_request(JSON, body) for body in bodies]


def _large_tensor_requests() -> list[bytes]:
    infer, scoring = "/v2/models/digits/infer", "/invocations"
    allowed = Settings().max_json_bytes - 1000
    side = int((allowed / 2) ** 0.5)  # each value takes two bytes: "0,"
    numbers = ",".join(["0"] * side**2)
    floats = (
        f'{{"inputs":[{{"name":"x","datatype":"FP32","shape":[1,1,{side},{side}],"data":[%s]}}]}}'
    )
    texts = '{"inputs":[{"name":"x","datatype":"BYTES","shape":[32],"data":[%s]}]}'
    table = '{"dataframe_split":{"columns":["image","id"],"data":[%s]}}'
    inputs = '{"inputs":[%s]}'
    bodies = [
        (infer, JSON, floats % numbers),
        (infer, JSON, floats.replace("FP32", "UINT8") % numbers),
        (infer, JSON, texts % ",".join(['"ab"'] * (allowed // 5))),
        (scoring, JSON, table % ",".join(['["ab",1]'] * (allowed // 9))),
        (scoring, JSON, inputs % ",".join(['"ab"'] * (allowed // 5))),
        (scoring, "text/csv", "image\n" + "\n" * allowed),
        (scoring, "text/csv", "image\n" + "ab\n" * (allowed // 3)),
    ]
    found = [_request(kind, text.encode(), path=path) for path, kind, text in bodies]
    large = int((Settings().max_body_bytes - 1000) ** 0.5) // 2  # each value takes four bytes
    tensor = (
        '{"name":"x","datatype":"FP32","shape":[1,1,%d,%d],"parameters":{"binary_data_size":%d}}'
    )
    head = '{"inputs":[' + tensor % (large, large, 4 * large**2) + "]}"
    more = f"Inference-Header-Content-Length: {len(head)}\r\n"
    body = head.encode() + bytes(4 * large**2)
    return [*found, _request("application/octet-stream", body, path=infer, more=more)]


def _empty_part_requests() -> list[bytes]:
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n'.encode()
    body = part * (64_000 // len(part)) + f"--{BOUNDARY}--\r\n".encode()
    return [_request(f"multipart/form-data; boundary={BOUNDARY}", body)]


def _metrics_requests() -> list[bytes]:
    return [b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"]


def _json(size: int, element: bytes) -> bytes:
    count = max(1, (size - 20) // (len(element) + 1))
    return b'{"images":[' + b",".join([element] * count) + b"]}"


def _request(
    content_type: str,
    body: bytes,
    length: int | None = None,
    path: str = "/v1/classify",
    more: str = "",
) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\n{more}"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    ).encode() + body


Attack = Callable[[int, float, Callable[[], None]], Counter[str]]
"""Calls the function to wait for the start, attacks a port for some seconds, and counts answers."""


def _play(attack: Attack, seconds: int) -> tuple[dict[str, Any], Traffic]:
    with paths_of_two() as (paths, image), service(paths) as running:
        return asyncio.run(_measure(running, image, attack, seconds))


async def _measure(
    running: RunningService, image: bytes, attack: Attack, seconds: int
) -> tuple[dict[str, Any], Traffic]:
    honest = Traffic(running.port, in_turn([post(image)]), HONEST_RPS)
    probes: list[Row] = []
    with _process(attack, running.port, seconds) as (begin, outcomes):
        async with honest.running():
            probing = asyncio.ensure_future(_probe(running.port, probes, QUIET_S + seconds + 2))
            await asyncio.sleep(QUIET_S)
            before_mb = _memory_mb(running)
            honest.fault("the attack begins")
            began = time.perf_counter()
            begin()
            max_mb = [0.0] * len(before_mb)
            while time.perf_counter() < began + seconds:
                await asyncio.sleep(0.5)
                max_mb = [max(pair) for pair in zip(max_mb, _memory_mb(running), strict=True)]
            ended = time.perf_counter()
            honest.fault("the attack ends")
            await asyncio.sleep(1)
            answers = await asyncio.to_thread(outcomes)
            await probing
    quiet = summary(between(honest.rows, began - QUIET_S + 1, began))
    during = summary(between(honest.rows, began, ended))
    probed = {
        kind: [row for row in between(probes, began, ended) if row.kind == kind]
        for kind in ("livez", "readyz")
    }
    allowed_ms = 2 * quiet["p99_ms"] + 20
    worst_ms = {
        f"{kind}_worst_ms": max(1000 * (row.done - row.due) for row in rows)
        for kind, rows in probed.items()
    }
    growth_mb = max(most - before for most, before in zip(max_mb, before_mb, strict=True))
    figures = {
        "seconds": seconds,
        "answers_to_attackers": dict(answers),
        "quiet_p50_ms": quiet["p50_ms"],
        "quiet_p99_ms": quiet["p99_ms"],
        **during,
        "failed": failed(between(honest.rows, began, ended)),
        "allowed_p99_ms": allowed_ms,
        "p99_over_allowed_ms": max(0.0, during["p99_ms"] - allowed_ms),
        **worst_ms,
        "probes_failed": sum(row.status != 200 for rows in probed.values() for row in rows),
        "worker_growth_mb": growth_mb,
    }
    return figures, honest


async def _probe(port: int, rows: list[Row], seconds: float) -> None:
    """Send probes at ``PROBES_RPS``, each on a new connection, and append their results."""
    until = time.perf_counter() + seconds
    for ask in itertools.cycle([get("/livez", "livez"), get("/readyz", "readyz")]):
        due = time.perf_counter()
        if due > until:
            return
        status = LOST
        with contextlib.suppress(OSError, ValueError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(ask.data)
            status = int((await reader.readline()).split()[1])
            writer.close()
        rows.append(Row(ask.kind, due, due, time.perf_counter(), status, b""))
        await asyncio.sleep(1 / PROBES_RPS)


def _memory_mb(running: RunningService) -> list[float]:
    return [worker.memory_info().rss / 2**20 for worker in running.workers()]


@contextlib.contextmanager
def _process(
    attack: Attack, port: int, seconds: int
) -> Iterator[tuple[Callable[[], None], Callable[[], Counter[str]]]]:
    """Run the attackers in a separate process, which is ready when the block begins.

    The first function starts the attack; the second waits for the counts. The process starts
    before the measurement, because its start would take CPU time from the honest clients.
    """
    context = multiprocessing.get_context("spawn")
    pipe, pipe_of_process = context.Pipe()
    process = context.Process(
        target=_run, args=(attack, port, seconds, pipe_of_process), daemon=True
    )
    process.start()

    def outcomes() -> Counter[str]:
        if not pipe.poll(seconds + 60):
            raise SystemExit(f"the attackers did not end within {seconds + 60} s")
        counts: Counter[str] = pipe.recv()
        return counts

    try:
        pipe.recv()
        yield partial(pipe.send, None), outcomes
    finally:
        process.join(10)
        process.kill()


def _run(attack: Attack, port: int, seconds: int, pipe: Connection) -> None:
    def wait() -> None:
        pipe.send("ready")
        pipe.recv()

    pipe.send(attack(port, seconds, wait))


class _Attacker:
    """One connection that sends its requests in turn and reads the answers."""

    def __init__(self, port: int, requests: list[bytes], first: int) -> None:
        self._port = port
        self._requests = requests
        self._next = first
        self.connect()

    def connect(self) -> None:
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.sock.connect_ex(("127.0.0.1", self._port))
        self._ask()

    def _ask(self) -> None:
        self._left = memoryview(self._requests[self._next % len(self._requests)])
        self._next += 1

    def send(self) -> bool:
        """Send more of the request; returns whether all of it is sent."""
        with contextlib.suppress(BlockingIOError):
            self._left = self._left[self.sock.send(self._left[:262_144]) :]
        return not self._left

    def receive(self) -> str | None:
        """The status of an answer, "closed", or None if nothing has arrived."""
        try:
            data = self.sock.recv(262_144)
        except BlockingIOError:
            return None
        if not data:
            return "closed"
        if not data.startswith(b"HTTP/1.1"):
            return None  # the rest of a long answer
        if b"onnection: close" not in data:
            self._ask()
        return data[9:12].decode()


def _post_again(
    clients: int,
    make_requests: Callable[[], list[bytes]],
    port: int,
    seconds: float,
    wait: Callable[[], None],
) -> Counter[str]:
    """Each client sends a request as soon as the previous one is answered."""
    requests = make_requests()
    wait()
    return _loop([_Attacker(port, requests, n) for n in range(clients)], seconds)


def _stall(clients: int, port: int, seconds: float, wait: Callable[[], None]) -> Counter[str]:
    """Each client sends a head and waits; it connects again when the service closes it."""
    head = _request("application/octet-stream", b"", 64 * 1024 * 1024)
    wait()
    return _loop([_Attacker(port, [head], 0) for _ in range(clients)], seconds)


def _loop(attackers: list[_Attacker], seconds: float) -> Counter[str]:
    counts: Counter[str] = Counter()
    selector = selectors.DefaultSelector()
    both = selectors.EVENT_READ | selectors.EVENT_WRITE
    for each in attackers:
        selector.register(each.sock, both, each)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for key, events in selector.select(0.1):
            attacker = key.data
            try:
                outcome = attacker.receive() if events & selectors.EVENT_READ else None
                sent = attacker.send() if outcome != "closed" else True
            except OSError:
                outcome, sent = "reset", True
            if outcome:
                counts[outcome] += 1
            if outcome in ("closed", "reset"):
                selector.unregister(attacker.sock)
                attacker.sock.close()
                attacker.connect()
                selector.register(attacker.sock, both, attacker)
            else:
                selector.modify(attacker.sock, selectors.EVENT_READ if sent else both, attacker)
    for each in attackers:
        each.sock.close()
    return counts
