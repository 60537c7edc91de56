"""Promotions back and forth under load: what they cost the clients, and how long they take.

    python -m benchmarks.swap_under_load [--swaps 100] [--keep-warm 0] [--json FILE]

Makes a home of its own with two small versions of the digits and serves it with two workers. An
open-loop client (requests are sent when they are due, late answers or not) asks at 70 % of the rate
that the same client reached without pauses. Meanwhile another process promotes one version after
the other, with gate and ledger; with ``--keep-warm 0`` each of them is loaded anew.

An answer has the wrong version if it is the old one though the request was sent after an answer of
the new one had come, or if its scores are not those of the version that it names. A swap lasts from
the command until half a second after the first answer of the new version. The process that promotes
stands for an operator's machine, so it takes only what the cores have left; puller and service run
as they always do.
"""

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common import RunningService, parser, report, running_service
from registry.home import Home
from training.datasets import load_dataset

LOAD = 0.7
CONNECTIONS = 16
CAPACITY_S = 4.0
PAUSE_S = 1.5
AFTER_S = 0.5
_VERSION = re.compile(rb"\r\nX-Model-Version: (\d+)\r\n", re.IGNORECASE)
_LENGTH = re.compile(rb"\r\nContent-Length: (\d+)\r\n", re.IGNORECASE)
_SCORE = re.compile(rb'"probability":([0-9.e-]+)')


class Load(asyncio.Protocol):
    """One connection: a request at a time, each answer noted."""

    def __init__(self, driver: "Driver") -> None:
        self._driver = driver
        self._data = b""
        self._due = self._sent = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._driver.free.append(self)

    def send(self, due: float) -> None:
        self._due, self._sent = due, time.perf_counter()
        self._transport.write(self._driver.request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        length = _LENGTH.search(self._data, 0, end + 2) if end > 0 else None
        if length is None or len(self._data) < end + 4 + int(length[1]):
            return
        answer, self._data = self._data, b""
        self._driver.note(self._due, self._sent, answer)
        self._driver.free.append(self)
        self._driver.give()

    def connection_lost(self, error: Exception | None) -> None:
        self._driver.lost += 1


class Driver:
    """Sends requests when they are due, on whichever connection is free."""

    def __init__(self, port: int, image: bytes) -> None:
        self.free: deque[Load] = deque()
        self.waiting: deque[float] = deque()
        self.answers: list[tuple[float, float, float, int]] = []  # due, sent, done, version
        self.lost = self.failed = self.wrong_score = 0
        self.scores: dict[int, bytes] = {}
        self._port = port
        head = (
            "POST /v1/classify?top_k=1 HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: application/octet-stream\r\nContent-Length: {len(image)}\r\n\r\n"
        )
        self.request = head.encode() + image

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(CONNECTIONS):
            await loop.create_connection(lambda: Load(self), "127.0.0.1", self._port)

    def note(self, due: float, sent: float, answer: bytes) -> None:
        version = _VERSION.search(answer)
        if not answer.startswith(b"HTTP/1.1 200") or version is None:
            self.failed += 1
            return
        number, score = int(version[1]), _SCORE.search(answer)
        if score is None or self.scores.setdefault(number, score[1][:6]) != score[1][:6]:
            self.wrong_score += 1
        self.answers.append((due, sent, time.perf_counter(), number))

    def give(self) -> None:
        while self.free and self.waiting:
            self.free.popleft().send(self.waiting.popleft())

    async def run(self, rate: float, until: asyncio.Event) -> None:
        """``rate`` requests a second; 0: as many as come back."""
        started, count = time.perf_counter(), 0
        while not until.is_set():
            now = time.perf_counter()
            if rate:
                while (due := started + count / rate) <= now:
                    self.waiting.append(due)
                    count += 1
            else:
                self.waiting.extend([now] * len(self.free))
            self.give()
            await asyncio.sleep(0.001 if rate else 0)
        while len(self.free) < CONNECTIONS and time.perf_counter() - now < 10:
            await asyncio.sleep(0.01)


def main() -> int:
    options = parser("Promotions back and forth under a load of 70 % of the capacity.")
    options.add_argument("--swaps", type=int, default=100)
    options.add_argument("--keep-warm", type=float, default=0.0, metavar="S")
    options.add_argument("--promoter", type=Path, help="the process that promotes; not for people")
    arguments = options.parse_args()
    if arguments.promoter:
        return promote_on_demand(Home(arguments.promoter))
    with tempfile.TemporaryDirectory(prefix="convoy-swap-") as name:
        home = Home(Path(name))
        prepare(home)
        image = load_dataset("digits", home.datasets).test.encode(0)
        os.environ["CONVOY_KEEP_WARM_S"] = str(arguments.keep_warm)
        with running_service(home.root, "models:/digits@champion", pull=True) as service:
            figures = asyncio.run(measure(home, service, image, arguments.swaps))
    report({"keep_warm_s": arguments.keep_warm, **figures}, arguments.json)
    return 0 if not figures["failed"] and not figures["wrong_version"] else 1


def prepare(home: Home) -> None:
    """Two versions, their plans chosen; the first is champion and lies on disk."""
    for epochs in ("2", "6"):
        run(home, "training", "--data", "digits", "--recipe", "dense", "--set", f"epochs={epochs}")
    for number in ("1", "2"):
        run(home, "registry", "plan", f"digits/{number}")
    run(home, "registry", "promote", "digits", "1")
    run(home, "registry", "pull", "models:/digits@champion")


async def measure(home: Home, service: RunningService, image: bytes, swaps: int) -> dict[str, Any]:
    driver = Driver(service.port, image)
    await driver.connect()
    capacity = await find_capacity(driver)
    before_mb = memory_mb(service)
    promoter = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.swap_under_load", "--promoter", str(home.root)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert promoter.stdin
    assert promoter.stdout
    await promoter.stdout.readline()  # it has loaded MLflow
    stop = asyncio.Event()
    load = asyncio.create_task(driver.run(LOAD * capacity, stop))
    await asyncio.sleep(PAUSE_S)
    windows: list[tuple[float, float]] = []
    command_s, decided_s = [], []
    for number in tqdm(range(swaps), unit="swap", disable=None):
        version = 2 if number % 2 == 0 else 1
        began = time.perf_counter()
        promoter.stdin.write(b"%d\n" % version)
        seen = len(driver.answers)
        said = asyncio.create_task(promoter.stdout.readline())
        first = None
        while first is None:
            await asyncio.sleep(0.005)
            new = (done for _, _, done, answered in driver.answers[seen:] if answered == version)
            first = next(new, None)
            if time.perf_counter() - began > 60:
                raise SystemExit(f"version {version} has not answered within 60 s")
        decided = float(json.loads(await said)["decided"])
        command_s.append(first - began)
        decided_s.append(max(0.0, first - decided))
        await asyncio.sleep(AFTER_S)
        windows.append((began, time.perf_counter()))
        await asyncio.sleep(PAUSE_S)
    stop.set()
    await load
    promoter.stdin.close()
    await promoter.wait()
    return {
        **judge(driver, windows),
        "capacity_rps": capacity,
        "load_rps": LOAD * capacity,
        "command_to_first_answer_median_s": statistics.median(command_s),
        "command_to_first_answer_worst_s": max(command_s),
        "decision_to_first_answer_median_s": statistics.median(decided_s),
        "decision_to_first_answer_worst_s": max(decided_s),
        "workers_mb_before": before_mb,
        "workers_mb_after": memory_mb(service),
    }


async def find_capacity(driver: Driver) -> float:
    stop = asyncio.Event()
    load = asyncio.create_task(driver.run(0, stop))
    await asyncio.sleep(1)
    before = len(driver.answers)
    await asyncio.sleep(CAPACITY_S)
    capacity = (len(driver.answers) - before) / CAPACITY_S
    stop.set()
    await load
    driver.answers.clear()
    return capacity


def judge(driver: Driver, windows: list[tuple[float, float]]) -> dict[str, Any]:
    due, sent, done, version = (np.array(column) for column in zip(*driver.answers, strict=True))
    inside = np.zeros(len(due), bool)
    for began, ended in windows:
        inside |= (done >= began) & (done <= ended)
    taken_ms = 1000 * (done - due)
    quiet, swapping = (float(np.percentile(taken_ms[each], 99)) for each in (~inside, inside))
    order = np.argsort(done)
    wrong = driver.wrong_score
    # The moment from which each version was known to serve: its first answer after the other's.
    turns = order[1:][np.diff(version[order]) != 0]
    for began, ended in windows:
        within = [each for each in turns if began <= done[each] <= ended]
        if within:
            fresh, known = version[within[0]], done[within[0]]
            late = (sent > known) & (done <= ended) & (version != fresh)
            wrong += int(late.sum())
    return {
        "requests": len(due) + driver.failed,
        "swaps": len(windows),
        "failed": driver.failed + driver.lost,
        "wrong_version": wrong,
        "p99_ratio": swapping / quiet,
        "longest_gap_ms": 1000 * float(np.diff(done[order]).max()),
        "quiet_p99_ms": quiet,
        "swap_p99_ms": swapping,
        "quiet_p50_ms": float(np.percentile(taken_ms[~inside], 50)),
        "swap_p50_ms": float(np.percentile(taken_ms[inside], 50)),
    }


def memory_mb(service: RunningService) -> float:
    """Of all workers, without what they share with others."""
    return sum(worker.memory_full_info().uss for worker in service.workers()) / 1e6


def promote_on_demand(home: Home) -> int:
    """Promote the version of each line that comes, and say when that was decided."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    from registry.promotion import promote
    from registry.store import ModelStore

    store = ModelStore(home)
    print("ready", flush=True)
    for line in sys.stdin:
        promote(store, "digits", int(line), force=True, reason="benchmark")
        # The clock of all processes of a machine.
        print(json.dumps({"decided": home.decided.stat().st_mtime + offset_s()}), flush=True)
    return 0


def offset_s() -> float:
    """From the wall clock to ``time.perf_counter``."""
    return time.perf_counter() - time.time()


def run(home: Home, *arguments: str) -> None:
    environment = {**os.environ, "CONVOY_HOME": str(home.root), "CONVOY_WORKERS": "2"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    subprocess.run(
        [sys.executable, "-m", *arguments], check=True, capture_output=True, env=environment
    )


if __name__ == "__main__":
    sys.exit(main())
