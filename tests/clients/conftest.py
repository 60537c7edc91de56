"""The real app behind a real socket, as in the service's tests, and answers made by hand."""

import asyncio
import json
from collections.abc import Callable, Iterator
from threading import Event
from typing import Any

import httpx
import pytest

from convoy_client import AsyncClient, Client
from convoy_client.retries import Clock
from tests.service.conftest import app as app
from tests.service.conftest import client as client
from tests.service.conftest import deploy as deploy
from tests.service.conftest import deploy_canary as deploy_canary
from tests.service.conftest import metrics as metrics
from tests.service.conftest import models as models
from tests.service.conftest import ready as ready
from tests.service.conftest import settings as settings
from tests.service.conftest import slot as slot
from tests.service.conftest import url as url

Handler = Callable[[httpx.Request], httpx.Response]
MODEL = {"name": "digits", "version": 1, "alias": "champion"}
ANSWER = {
    "model": MODEL,
    "predictions": [{"label": "7", "index": 7, "probability": 1}],
    "request_id": "abc",
    "timings_ms": {"decode": 0.3, "total": 2},
}


class FakeTime:
    """A clock that moves only when a client sleeps. ``waits`` has the seconds of each sleep."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.waits: list[float] = []
        self.clock = Clock(lambda: self.now_s, lambda: 1_800_000_000 + self.now_s, lambda: 0.5)

    def sleep(self, seconds: float, ended: Event | None = None) -> None:
        self.waits.append(seconds)
        self.now_s += seconds

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


class Sync:
    """``Client`` and ``AsyncClient`` behind the same blocking methods."""

    def __init__(self, handler: Handler, time: FakeTime, **options: Any) -> None:
        self._client = Client(
            "http://service.example",
            transport=httpx.MockTransport(handler),
            clock=time.clock,
            sleep=time.sleep,
            **options,
        )

    def classify(self, *arguments: Any, **options: Any) -> Any:
        with self._client:
            return self._client.classify(*arguments, **options)

    def classify_many(self, images: Any, **options: Any) -> list[Any]:
        with self._client:
            return list(self._client.classify_many(images, **options))

    def ready(self) -> bool:
        with self._client:
            return self._client.ready()


class Async:
    """Like ``Sync``, for ``AsyncClient``."""

    def __init__(self, handler: Handler, time: FakeTime, **options: Any) -> None:
        self._client = AsyncClient(
            "http://service.example",
            transport=httpx.MockTransport(handler),
            clock=time.clock,
            sleep=time.sleep_async,
            **options,
        )

    def classify(self, *arguments: Any, **options: Any) -> Any:
        async def run() -> Any:
            async with self._client:
                return await self._client.classify(*arguments, **options)

        return asyncio.run(run())

    def classify_many(self, images: Any, **options: Any) -> list[Any]:
        async def run() -> list[Any]:
            async with self._client:
                return [each async for each in self._client.classify_many(images, **options)]

        return asyncio.run(run())

    def ready(self) -> bool:
        async def run() -> bool:
            async with self._client:
                return await self._client.ready()

        return asyncio.run(run())


MakeClient = Callable[..., Any]


@pytest.fixture(params=[Sync, Async])
def connect(request: pytest.FixtureRequest, time: FakeTime) -> MakeClient:
    """A function that makes a client of either kind, whose requests go to ``handler``."""

    def make(handler: Handler, **options: Any) -> Any:
        return request.param(handler, time, **options)

    return make


def answers(*responses: httpx.Response | httpx.TransportError) -> Iterator[Any]:
    """Each of ``responses`` in turn, and then good answers."""
    yield from responses
    while True:
        yield httpx.Response(200, json=ANSWER)


def in_turn(*responses: httpx.Response | httpx.TransportError) -> Handler:
    """A handler that answers with, or raises, each of ``responses`` in turn."""
    left = answers(*responses)

    def handle(request: httpx.Request) -> httpx.Response:
        found = next(left)
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, httpx.Response)
        # A response can be read only once, and a test's parameter is used by both clients.
        return httpx.Response(found.status_code, headers=found.headers, content=found.content)

    return handle


def problem(status: int, kind: str, **headers: str) -> httpx.Response:
    body = {"type": f"urn:convoy:problem:{kind}", "status": status, "detail": f"it is {kind}"}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, content=json.dumps(body), headers=names)
