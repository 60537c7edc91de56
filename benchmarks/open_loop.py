"""An open-loop client: requests are sent when they are due, late answers or not.

So what a client waits for is counted from the moment at which it would have asked, and a server
that stalls cannot hide it by being asked less. Shared by the benchmarks of releases, as are the two
small versions that they serve.
"""

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import RunningService, running_service
from registry.home import Home
from training.datasets import load_dataset

CONNECTIONS = 16
CAPACITY_S = 4.0
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


@contextmanager
def two_versions(name: str) -> Iterator[tuple[Home, RunningService, bytes]]:
    """A home with two small versions, a service that follows its registry, and a picture for it."""
    with tempfile.TemporaryDirectory(prefix=f"convoy-{name}-") as folder:
        home = Home(Path(folder))
        prepare_two(home)
        image = load_dataset("digits", home.datasets).test.encode(0)
        with running_service(home.root, "models:/digits@champion", pull=True) as service:
            yield home, service, image


def prepare_two(home: Home) -> None:
    """Two versions, their plans chosen; the first is champion and lies on disk."""
    for epochs in ("2", "6"):
        run(home, "training", "--data", "digits", "--recipe", "dense", "--set", f"epochs={epochs}")
    for number in ("1", "2"):
        run(home, "registry", "plan", f"digits/{number}")
    run(home, "registry", "promote", "digits", "1")
    run(home, "registry", "pull", "models:/digits@champion")


def run(home: Home, *arguments: str) -> None:
    environment = {**os.environ, "CONVOY_HOME": str(home.root), "CONVOY_WORKERS": "2"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    subprocess.run(
        [sys.executable, "-m", *arguments], check=True, capture_output=True, env=environment
    )
