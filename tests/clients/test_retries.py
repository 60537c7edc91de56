"""Which requests the clients send again, and after which waits. The clock is not real."""

import asyncio
import contextlib
import itertools
import json
import random
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from convoy_client import (
    AsyncClient,
    Client,
    ConvoyError,
    Forbidden,
    InvalidAnswer,
    InvalidImage,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServerError,
    ServiceUnreachable,
    Timeout,
    Unauthorized,
    Unavailable,
)
from convoy_client.retries import retry_after_s
from tests.clients.conftest import ANSWER, MODEL, FakeTime, MakeClient, in_turn, problem


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        httpx.WriteError("broken pipe"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("Server disconnected without sending a response."),
        problem(429, "rate-exceeded"),
        problem(503, "model-not-ready"),
        problem(504, "deadline-exceeded"),
        httpx.Response(502, text="<h1>bad gateway</h1>"),
    ],
)
def test_a_transient_failure_is_tried_again(
    failure: httpx.Response | httpx.TransportError, connect: MakeClient, time: FakeTime
) -> None:
    assert connect(in_turn(failure, failure)).classify(b"picture").version == 1
    assert time.waits == [0.125, 0.25]  # half of 0.25 and of 0.5, by the test's chance


@pytest.mark.parametrize(
    ("status", "kind", "error"),
    [
        (400, "bad-request", InvalidRequest),
        (401, "token-missing", Unauthorized),
        (403, "token-insufficient", Forbidden),
        (404, "model-not-found", NotFound),
        (408, "request-timeout", InvalidRequest),
        (413, "image-too-large", InvalidImage),
        (415, "unsupported-image-type", InvalidImage),
        (422, "invalid-image", InvalidImage),
        (500, "internal-error", ServerError),
    ],
)
def test_a_failure_that_would_repeat_is_raised_at_once(
    status: int, kind: str, error: type[ConvoyError], connect: MakeClient, time: FakeTime
) -> None:
    handler = in_turn(problem(status, kind, X_Request_Id="id-7"))
    with pytest.raises(error, match=f"it is {kind}") as raised:
        connect(handler).classify(b"picture")
    assert (raised.value.status, raised.value.request_id) == (status, "id-7")
    assert time.waits == []


def test_after_the_last_retry_the_last_failure_is_raised(
    connect: MakeClient, time: FakeTime
) -> None:
    handler = in_turn(*itertools.repeat(problem(503, "overloaded"), 9))
    with pytest.raises(Overloaded):
        connect(handler, retries=3).classify(b"picture")
    assert len(time.waits) == 3
    with pytest.raises(Unavailable):
        connect(in_turn(problem(503, "model-not-ready")), retries=0).classify(b"picture")


def test_retry_after_is_waited_in_addition(connect: MakeClient, time: FakeTime) -> None:
    connect(in_turn(problem(429, "rate-exceeded", Retry_After="7"))).classify(b"picture")
    assert time.waits == [7.125]


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(
    connect: MakeClient, time: FakeTime
) -> None:
    handler = in_turn(problem(503, "model-not-ready", Retry_After="120"))
    with pytest.raises(Unavailable) as raised:
        connect(handler, deadline_s=60).classify(b"picture")
    assert raised.value.retry_after_s == 120
    assert time.waits == []


def test_the_deadline_holds_for_all_tries_together(connect: MakeClient, time: FakeTime) -> None:
    timeouts = []

    def handle(request: httpx.Request) -> httpx.Response:
        timeouts.append(request.extensions["timeout"]["read"])
        time.now_s += timeouts[-1]
        raise httpx.ReadTimeout("slow")

    with pytest.raises(Timeout):
        connect(handle, timeout_s=4, deadline_s=10, retries=99).classify(b"picture")
    assert timeouts[:2] == [4, 4]
    assert time.now_s <= 1010
    assert timeouts[2] < 4


def test_an_answer_that_arrives_too_slowly_is_given_up(time: FakeTime) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        def trickle() -> Iterator[bytes]:
            for _ in range(100):
                time.now_s += 1
                yield b"{"

        return httpx.Response(200, content=trickle())

    options = {"clock": time.clock, "sleep": time.sleep}
    transport = httpx.MockTransport(handle)
    with (
        Client("http://a", timeout_s=5, retries=0, transport=transport, **options) as client,  # type: ignore[arg-type]
        pytest.raises(Timeout, match="too slowly"),
    ):
        client.classify(b"picture")


def test_waits_grow_to_ten_seconds_and_chance_shortens_each(time: FakeTime) -> None:
    from convoy_client.retries import Clock, RetryPolicy

    chance = random.Random(0)
    clock = Clock(time.clock.monotonic, time.clock.unix, chance.random)
    attempts = RetryPolicy(30, 10_000, 12, clock).begin("http://a")
    waits = [attempts.wait_after_s(Unavailable("no")) for _ in range(12)]
    assert all(0 <= wait <= min(10, 0.25 * 2**n) for n, wait in enumerate(waits))
    assert max(waits) > 5


@pytest.mark.parametrize(
    ("text", "date", "seconds"),
    [
        ("3", "", 3.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", "", 40.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", "Thu, 01 Jan 1970 00:01:30 GMT", 10.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", "", 0.0),
        ("", "", None),
        ("soon", "", None),
        ("-1", "", None),
        ("1.5", "", None),
        ("Thu, 99 Jan 1970 00:00:00 GMT", "", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str, date: str, seconds: float | None) -> None:
    assert retry_after_s({"retry-after": text, "date": date}, now_unix_s=60.0) == seconds


def test_a_server_that_does_not_speak_http_is_not_asked_again(
    connect: MakeClient, time: FakeTime
) -> None:
    handler = in_turn(httpx.RemoteProtocolError("illegal status line: bytearray(b'220 mail')"))
    with pytest.raises(InvalidAnswer, match="does not speak HTTP"):
        connect(handler).classify(b"picture")
    assert time.waits == []


def test_ready_asks_once(connect: MakeClient, time: FakeTime) -> None:
    assert connect(lambda request: httpx.Response(200, json={"ready": True})).ready()
    assert not connect(in_turn(problem(503, "model-not-ready"))).ready()
    assert not connect(in_turn(httpx.ConnectError("refused"))).ready()
    with pytest.raises(NotFound):
        connect(in_turn(httpx.Response(404, text="<html>"))).ready()
    assert time.waits == []


def answer(**model: Any) -> httpx.Response:
    """A good answer, but for some members of its model."""
    body = json.dumps({**ANSWER, "model": {**MODEL, **model}})
    return httpx.Response(200, text=body)


def prediction(probability: float) -> httpx.Response:
    body = {**ANSWER, "predictions": [{"label": "7", "index": 7, "probability": probability}]}
    return httpx.Response(200, text=json.dumps(body))


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(200, text="<html>hello</html>"), "not JSON"),
        (httpx.Response(200, text='{"model": {"name"'), "not JSON"),
        (httpx.Response(200, json=[1]), "not of type dict"),
        (httpx.Response(200, json={**ANSWER, "model": None}), "not of type dict"),
        (httpx.Response(200, json={**ANSWER, "request_id": 7}), "request_id is 7"),
        (
            httpx.Response(200, json={k: v for k, v in ANSWER.items() if k != "predictions"}),
            "no pr",
        ),
        (httpx.Response(200, json={**ANSWER, "predictions": [{"label": "a"}]}), "no index"),
        (httpx.Response(301, headers={"Location": "https://a/"}), "redirects to https://a/"),
        (answer(version=0), "version is 0"),
        (answer(version=2**63), "version is 9223"),
        (answer(name="\ud800"), "not Unicode"),
        (prediction(float("nan")), "probability is nan"),
        (prediction(1.5), "from 0 to 1"),
        (httpx.Response(200, content=b"x" * (16 * 1024 * 1024 + 1)), "16,777,216 bytes"),
    ],
)
def test_an_answer_of_another_server_is_an_error_that_says_so(
    response: httpx.Response, message: str, connect: MakeClient
) -> None:
    with pytest.raises(InvalidAnswer, match=message):
        connect(in_turn(response)).classify(b"picture")


class Chunks(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that is sent as it is."""

    def __init__(self, *chunks: bytes) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        yield from self._chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for each in self._chunks:
            yield each


def test_the_asyncio_client_does_not_wait_for_a_head_that_never_ends() -> None:
    ended: asyncio.Event

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while not writer.is_closing():
                writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        ended.set()

    async def ask() -> None:
        nonlocal ended
        ended = asyncio.Event()
        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with AsyncClient(f"http://127.0.0.1:{port}", timeout_s=0.2, retries=0) as client:
            with pytest.raises(Timeout):
                await client.classify(b"picture")
        server.close()
        await server.wait_closed()
        await ended.wait()

    asyncio.run(ask())


def test_a_compressed_answer_is_refused_before_it_grows(connect: MakeClient) -> None:
    def compressed(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=Chunks(b"\x1f\x8b"))

    with pytest.raises(InvalidAnswer, match="Content-Encoding 'gzip'"):
        connect(compressed).classify(b"picture")


def test_fields_of_a_newer_service_are_skipped(connect: MakeClient) -> None:
    newer = {**ANSWER, "coverage": 0.9, "model": {**ANSWER["model"], "digest": "5"}}  # type: ignore[dict-item]
    found = connect(lambda request: httpx.Response(200, json=newer)).classify(b"picture")
    assert found.predictions[0].probability == 1.0


def test_an_error_can_be_pickled() -> None:
    import copy

    error = ServiceUnreachable("gone", request_id="id-7")
    assert copy.copy(error).request_id == "id-7"


def test_connections_that_break_are_recognised_on_a_real_socket() -> None:
    """httpx tells them apart by its text only, which a newer httpx may change."""
    body = json.dumps(ANSWER).encode()
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    replies = iter([b"", head + body[:20], head[:9], head + body])
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for reply in replies:
                peer, _ = server.accept()
                with peer:
                    peer.recv(100_000)
                    peer.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        waits: list[float] = []
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with Client(url, sleep=lambda seconds, ended: waits.append(seconds)) as client:
            assert client.classify(b"picture").request_id == "abc"
        thread.join()
    assert len(waits) == 3
