"""Both clients against the real app, and what they send."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import FrozenInstanceError
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import convoy_client
from convoy_client import (
    AsyncClient,
    Classification,
    Client,
    Failure,
    ImageInput,
    InvalidImage,
    InvalidRequest,
    Metadata,
    NotFound,
    Unavailable,
)
from registry.model.bundle import Bundle
from service.loading.model_slot import ModelSlot
from tests.clients.conftest import ANSWER, MakeClient
from tests.conftest import WAIT_TIMEOUT_S, wait_for


def test_every_kind_of_picture_gets_the_same_predictions(
    url: str, png: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(png)
    image = Image.open(BytesIO(png))
    kinds: list[ImageInput] = [path, str(path), png, bytearray(png), memoryview(png), image]
    with Client(url) as client:
        answers = [client.classify(each, top_k=3) for each in [*kinds, np.asarray(image)]]
    assert len({each.predictions for each in answers}) == 1
    first = answers[0]
    assert (first.model, first.version, first.alias) == ("digits", 1, "champion")
    assert len(first.predictions) == 3
    assert first.predictions[0].probability >= first.predictions[1].probability
    assert first.timings_ms["total"] > 0
    with pytest.raises(FrozenInstanceError):
        first.version = 2  # type: ignore[misc]


def test_the_model_version_and_alias_are_chosen(url: str, png: bytes) -> None:
    with Client(url) as client:
        assert client.classify(png, model="digits", version=1).version == 1
        assert client.classify(png, model="digits", alias="champion").alias == "champion"
        with pytest.raises(NotFound, match="version 9"):
            client.classify(png, model="digits", version=9)
        with pytest.raises(NotFound, match="no model 'other x'"):
            client.classify(png, model="other x")
        with pytest.raises(InvalidRequest, match="top_k"):
            client.classify(png, top_k=0)


def test_the_service_is_described(url: str) -> None:
    with Client(url) as client:
        (model,) = client.models()
        details = client.model("digits", version=1)
        assert client.model("digits", alias="champion") == client.model("digits")
        assert client.ready()
    assert (model.name, model.version, model.plan) == ("digits", 1, "torch-eager")
    assert details.labels == tuple("0123456789")
    assert "validation_accuracy" in details.metrics
    assert details.canary is None


def test_labels_and_plan_are_in_the_metadata(url: str) -> None:
    async def run() -> Metadata:
        async with AsyncClient(url) as client:
            return await client.metadata("digits", version=1)

    with Client(url) as client:
        found = client.metadata("digits")
        with pytest.raises(NotFound, match="version 9"):
            client.metadata("digits", version=9)
        with pytest.raises(NotFound, match="no model 'other x'"):
            client.metadata("other x")
    assert asyncio.run(run()) == found
    assert (found.name, found.alias, found.plan) == ("digits", "champion", "torch-eager")
    assert found.labels == tuple("0123456789")


def test_before_a_version_is_loaded_the_service_is_not_ready(
    client: object, slot: ModelSlot, connect: MakeClient
) -> None:
    answer = {"models": [{"name": "a", "wanted": "models:/a@champion", "ready": False}]}
    absent = dict.fromkeys(("version", "alias", "device", "plan"))
    answer["models"][0] |= {**absent, "error": "nothing is deployed"}
    with Client(
        "http://a", transport=httpx.MockTransport(lambda _: httpx.Response(200, json=answer))
    ) as asked:
        assert asked.models()[0].error == "nothing is deployed"
        assert asked.models()[0].version is None


def test_many_pictures_are_answered_in_order_and_a_bad_one_is_a_failure(
    url: str, png: bytes, tmp_path: Path
) -> None:
    images: list[ImageInput] = [png, b"no picture", png, tmp_path / "missing.png", png]
    with Client(url, concurrency=2) as client:
        results = list(client.classify_many(iter(images), top_k=1))

    async def run() -> list[convoy_client.Result]:
        async def stream() -> AsyncIterator[ImageInput]:
            for each in images:
                yield each

        async with AsyncClient(url, concurrency=2) as client:
            return [each async for each in client.classify_many(stream(), top_k=1)]

    for found in (results, asyncio.run(run())):
        assert [isinstance(each, Classification) for each in found] == [1, 0, 1, 0, 1]
        assert isinstance(found[1], Failure)
        assert isinstance(found[1].error, InvalidImage)
        assert found[1].error.status == 415
        assert isinstance(found[3], Failure)
        assert "missing.png" in found[3].error.detail


class Gate:
    """Counts requests that are under way; each waits until ``release`` is set."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.running = 0
        self.most = 0
        self.full = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
            if self.running == 3:
                self.full.set()
        assert self.release.wait(WAIT_TIMEOUT_S)
        with self._lock:
            self.running -= 1
        return httpx.Response(200, json={**ANSWER, "request_id": request.read().decode()})


def test_no_more_pictures_are_taken_than_are_sent_at_once() -> None:
    gate, taken = Gate(), []

    def images() -> Iterator[bytes]:
        for number in range(20):
            taken.append(number)
            yield str(number).encode()

    with Client("http://a", concurrency=3, transport=httpx.MockTransport(gate)) as client:
        results = client.classify_many(images())
        found: list[convoy_client.Result] = []

        def read() -> None:
            found.extend(results)

        reader = threading.Thread(target=read)
        reader.start()
        assert gate.full.wait(WAIT_TIMEOUT_S)
        assert len(taken) == 3
        gate.release.set()
        reader.join()
    assert gate.most == 3
    assert [each.request_id for each in found if isinstance(each, Classification)] == [
        str(number) for number in range(20)
    ]


def test_the_asyncio_client_sends_many_pictures_at_once_too() -> None:
    async def run() -> None:
        taken, running, most = 0, 0, 0
        full, release = asyncio.Event(), asyncio.Event()

        def images() -> Iterator[bytes]:
            nonlocal taken
            for number in range(20):
                taken += 1
                yield str(number).encode()

        async def handle(request: httpx.Request) -> httpx.Response:
            nonlocal running, most
            running += 1
            most = max(most, running)
            if running == 3:
                full.set()
            await release.wait()
            running -= 1
            return httpx.Response(200, json={**ANSWER, "request_id": request.content.decode()})

        async with AsyncClient(
            "http://a", concurrency=3, transport=httpx.MockTransport(handle)
        ) as client:

            async def read() -> list[convoy_client.Result]:
                return [each async for each in client.classify_many(images())]

            reader = asyncio.create_task(read())
            await asyncio.wait_for(full.wait(), WAIT_TIMEOUT_S)
            assert taken == 3
            release.set()
            found = await reader
        assert most == 3
        assert [each.request_id for each in found if isinstance(each, Classification)] == [
            str(number) for number in range(20)
        ]

    asyncio.run(run())


def test_a_caller_may_stop_early(url: str, png: bytes) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield png

    with Client(url, concurrency=2) as client:
        results = client.classify_many(endless())
        assert isinstance(next(results), Classification)
        results.close()

    async def run() -> None:
        async with AsyncClient(url, concurrency=2) as client:
            results = client.classify_many(endless())
            assert isinstance(await anext(results), Classification)
            await results.aclose()

    asyncio.run(run())


def test_during_a_canary_each_session_gets_one_version(
    ready: object,
    url: str,
    slot: ModelSlot,
    deploy_canary: Callable[..., tuple[Bundle, Bundle]],
    png: bytes,
) -> None:
    deploy_canary(share=0.5)
    assert slot.refresh()
    with Client(url) as client:
        details = client.model("digits")
        assert details.canary is not None
        assert details.canary.version == 2
        assert client.model("digits", version=2).version == 2
        for session in map(str, range(20)):
            versions = {client.classify(png, session=session).version for _ in range(3)}
            assert len(versions) == 1


def sent(handler_client: Callable[[httpx.MockTransport], object]) -> httpx.Request:
    """The one request that ``handler_client`` sends."""
    requests = []

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, json=ANSWER)

    handler_client(httpx.MockTransport(handle))
    (request,) = requests
    return request


@pytest.mark.parametrize(
    ("url", "options", "target"),
    [
        ("http://a:1", {}, "/v1/classify?top_k=5"),
        ("http://a:1/", {}, "/v1/classify?top_k=5"),
        ("https://a/convoy/", {"top_k": 2}, "/convoy/v1/classify?top_k=2"),
        ("https://a/a%20b", {}, "/a%20b/v1/classify?top_k=5"),
        ("http://a", {"model": "a/b c"}, "/v1/models/a%2Fb%20c/classify?top_k=5"),
        ("http://a", {"model": "m?x#y"}, "/v1/models/m%3Fx%23y/classify?top_k=5"),
        ("http://a", {"model": "50%"}, "/v1/models/50%25/classify?top_k=5"),
        ("http://a", {"model": "m", "version": 7}, "/v1/models/m/versions/7/classify?top_k=5"),
        ("http://a", {"model": "m", "alias": "ä"}, "/v1/models/m/aliases/%C3%A4/classify?top_k=5"),
    ],
)
def test_names_are_quoted_and_a_proxys_path_is_kept(url: str, options: Any, target: str) -> None:
    request = sent(lambda transport: Client(url, transport=transport).classify(b"x", **options))
    assert request.url.raw_path.decode() == target
    assert request.method == "POST"
    assert request.read() == b"x"


def test_the_token_and_the_session_are_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(token: str | None) -> httpx.Headers:
        def classify(transport: httpx.MockTransport) -> object:
            return Client(transport=transport, token=token).classify(b"x", session="ann")

        return sent(classify).headers

    assert "Authorization" not in ask(None)
    assert ask("secret")["Authorization"] == "Bearer secret"
    assert ask("secret")["X-Session-Id"] == "ann"
    monkeypatch.setenv("CONVOY_TOKEN", "outside")
    assert ask(None)["Authorization"] == "Bearer outside"
    assert ask("secret")["Authorization"] == "Bearer secret"
    assert "Authorization" not in ask("")


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:80", "http://localhost:abc", "ftp://localhost", "http://", "http://[::1"),
        *("http://a?b=c", "http://a#b", "http://user:word@a"),  # pragma: allowlist secret
    ],
)
def test_an_address_that_cannot_be_used_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="http://HOST:PORT") as raised:
        Client(url)
    assert "word" not in str(raised.value)


def test_arguments_that_cannot_be_used_are_refused_at_once() -> None:
    cases: list[dict[str, Any]] = [
        {"timeout_s": 0},
        {"deadline_s": -1},
        {"retries": -1},
        {"concurrency": 0},
    ]
    for options in cases:
        (name,) = options
        with pytest.raises(ValueError, match=name):
            Client(**options)
        with pytest.raises(ValueError, match=name):
            AsyncClient(**options)
    with pytest.raises(ValueError, match="token must be printable") as raised:
        Client(token="secret\r\nX-Other: 1")
    assert "secret" not in str(raised.value)
    client = Client()
    cases = [
        {"version": 1},
        {"alias": "champion"},
        {"model": "m", "version": 1, "alias": "a"},
        {"model": ".."},
        {"model": ""},
        {"model": "m", "alias": "."},
        {"session": "a\nb"},
    ]
    for wrong in cases:
        with pytest.raises(ValueError):  # noqa: PT011 - the messages differ
            client.classify(b"x", **wrong)
        with pytest.raises(ValueError):  # noqa: PT011
            client.classify_many([b"x"], **wrong)


def test_an_error_of_the_callers_own_iterable_ends_the_run(connect: MakeClient) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x"
        raise KeyError("the disk is gone")

    client = connect(lambda request: httpx.Response(200, json=ANSWER))
    with pytest.raises(KeyError):
        client.classify_many(broken())


def test_a_service_that_is_down_fails_each_picture(connect: MakeClient) -> None:
    client = connect(lambda request: httpx.Response(503), retries=1)
    results = client.classify_many([b"x", b"y"])
    assert [type(each.error) for each in results] == [Unavailable, Unavailable]


def test_a_run_that_ends_early_sends_nothing_again() -> None:
    """Otherwise Ctrl-C would wait for the retries of a service that is down."""
    asked = threading.Event()

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.set()
        raise httpx.ConnectError("refused")

    def interrupted() -> Iterator[bytes]:
        yield b"x"
        assert asked.wait(WAIT_TIMEOUT_S)
        raise KeyboardInterrupt

    transport = httpx.MockTransport(refuse)
    with Client("http://a", retries=10_000, deadline_s=10_000, transport=transport) as client:
        with pytest.raises(KeyboardInterrupt):
            list(client.classify_many(interrupted()))
        wait_for(
            lambda: (
                not any(thread.name.startswith("convoy-client") for thread in threading.enumerate())
            )
        )
