"""Where a request ends, and how long a client may take for it; on socket pairs, without a loop."""

import contextlib
import socket
from collections.abc import Iterator

import psutil
import pytest

from service.server.protocol import Limits
from service.server.sockets.connection import MIN_BYTES_PER_S, Connection, ConnectionState
from service.server.sockets.request_reader import (
    MAX_HEAD_BYTES,
    RECEIVE_BYTES,
    HeadTooLong,
    measure,
)


class Pair:
    """A client's socket, and the service's ``Connection`` at its other end."""

    def __init__(self) -> None:
        self.client, served = socket.socketpair()
        self.served = Connection(served, None, None, Limits(max_body_bytes=1000, keep_alive_s=60))

    def sends(self, data: bytes) -> Connection:
        self.client.sendall(data)
        self.served.receive()
        return self.served

    def close(self) -> None:
        self.client.close()
        self.served.sock.close()


@pytest.fixture
def pair(clock: "Clock") -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


class Clock:
    """A monotonic clock for the connections, which only the tests advance."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("service.server.sockets.connection.time", made)
    return made


def post(body: bytes, extra: str = "") -> bytes:
    return f"POST / HTTP/1.1\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


def test_a_request_is_taken_when_all_of_it_has_arrived(pair: Pair) -> None:
    data = post(b"hello")
    for end in range(1, len(data)):
        pair.sends(data[end - 1 : end])
        assert pair.served.take() is None
        assert pair.served.state is ConnectionState.READING
    request = pair.sends(data[-1:]).take()
    assert request is not None
    assert (request.body, request.digits, request.complete) == (b"hello", "5", True)
    assert request.is_upload
    assert pair.served.take() is None


def test_pipelined_requests_are_taken_one_by_one(pair: Pair) -> None:
    pair.sends(post(b"one") + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + post(b"two")[:-1])
    bodies = [request.body for request in (pair.served.take(), pair.served.take()) if request]
    assert bodies == [b"one", b""]
    assert pair.served.take() is None
    request = pair.sends(b"o").take()
    assert request is not None
    assert request.body == b"two"


def test_a_large_body_is_complete_and_ends_before_the_next_request(pair: Pair) -> None:
    pair.served.limits = Limits()
    body = bytes(range(256)) * 2000
    data = post(body)
    pair.sends(data[:100_000])
    assert pair.served.take() is None
    for start in range(100_000, len(data), 100_000):
        pair.sends(data[start : start + 100_000])
        request = pair.served.take()
    assert request is not None
    assert request.body[:] == body
    assert request.open_body().read(len(body)) == body
    assert pair.served.reader.size == 0
    request = pair.sends(post(b"next")).take()
    assert request is not None
    assert request.body == b"next"


def test_pipelined_requests_do_not_accumulate_in_the_process(pair: Pair) -> None:
    pair.client.setblocking(False)
    request = b"GET / HTTP/1.1\r\n\r\n"
    for _ in range(300):
        with contextlib.suppress(BlockingIOError):
            pair.client.send(request * 4000)
        pair.served.receive()
        assert pair.served.take() is not None
    assert pair.served.reader.size < 2 * RECEIVE_BYTES


def test_a_request_may_take_ten_seconds_and_more_for_the_bytes_it_sends(
    pair: Pair, clock: Clock
) -> None:
    assert pair.served.deadline == clock.now + 60  # keep_alive_s
    data = post(bytes(900))
    started_at = clock.now
    for start in range(0, 900, 100):
        pair.sends(data[start : start + 100])
        pair.served.take()
        assert pair.served.deadline <= started_at + 10 + (start + 100) / MIN_BYTES_PER_S
        clock.now += 1
    assert pair.served.deadline > started_at + 10


def test_an_announced_length_does_not_extend_the_deadline(pair: Pair, clock: Clock) -> None:
    pair.served.limits = Limits()
    pair.sends(b"POST / HTTP/1.1\r\nContent-Length: 67000000\r\n\r\n")
    assert pair.served.take() is None
    assert pair.served.deadline < clock.now + 11


def test_a_fast_start_does_not_allow_a_longer_pause(pair: Pair, clock: Clock) -> None:
    pair.served.limits = Limits()
    pair.sends(b"POST / HTTP/1.1\r\nContent-Length: 67000000\r\n\r\n" + bytes(50_000))
    pair.served.reader.received += bytes(40_000_000)  # more than a socket pair holds
    pair.served.take()
    assert pair.served.deadline == clock.now + 10


def test_slow_clients_are_closed_first_and_fresh_ones_last(clock: Clock) -> None:
    names = ("slow body", "old and idle", "fresh and idle", "fast body", "had its answer")
    pairs = {name: Pair() for name in names}
    clock.now += 30
    pairs["fresh and idle"].served.rest()
    for name in ("slow body", "fast body"):
        pairs[name].served.limits = Limits()
        pairs[name].sends(b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
        pairs[name].served.take()
    pairs["had its answer"].served.linger()
    clock.now += 2
    pairs["fast body"].sends(bytes(80_000))
    order = sorted(pairs, key=lambda name: pairs[name].served.closing_order(clock.now))
    assert set(order[:2]) == {"slow body", "had its answer"}
    assert order[2:] == ["old and idle", "fresh and idle", "fast body"]
    for each in pairs.values():
        each.close()


def test_long_heads_are_not_cached() -> None:
    before = psutil.Process().memory_info().rss
    for number in range(2000):
        measure(b"POST / HTTP/1.1\r\nX: %d" % number + b"y" * 30_000)
    assert psutil.Process().memory_info().rss - before < 20_000_000


def test_an_endless_head_is_refused(pair: Pair) -> None:
    for _ in range(MAX_HEAD_BYTES // 1024 - 1):
        assert pair.sends(b"x" * 1024).take() is None
    with pytest.raises(HeadTooLong):
        pair.sends(b"x" * 1024).take()


def test_the_server_does_not_wait_for_a_body_over_the_limit(pair: Pair) -> None:
    request = pair.sends(post(bytes(1001))[:60]).take()
    assert request is not None
    assert (request.complete, request.body, request.digits) == (False, b"", "1001")


def test_the_server_does_not_wait_for_a_json_body_over_its_own_limit(pair: Pair) -> None:
    pair.served.limits = Limits(max_body_bytes=1000, max_json_bytes=100)
    head = "POST / HTTP/1.1\r\nContent-Length: 101\r\nContent-Type:{}\r\n\r\n"
    request = pair.sends(head.format("Application/JSON; charset=utf-8").encode()).take()
    assert request is not None
    assert (request.complete, request.digits) == (False, "101")
    assert pair.sends(head.format("image/png").encode()).take() is None


def test_a_client_that_expects_100_continue_is_reported_once(pair: Pair) -> None:
    data = post(b"hello", "Expect: 100-Continue\r\n")
    pair.sends(data[:-5])
    assert pair.served.take() is None
    assert pair.served.reader.expects()
    assert not pair.served.reader.expects()
    request = pair.sends(data[-5:]).take()
    assert request is not None
    assert request.body == b"hello"
    assert b"Expect" not in request.head
    request = pair.sends(data).take()
    assert request is not None
    assert b"Expect" not in request.head
    assert not pair.served.reader.expects()


@pytest.mark.parametrize(
    ("head", "length"),
    [
        ("POST / HTTP/1.1\r\nContent-Length: 5", 5),
        ("POST / HTTP/1.1\r\ncOnTent-LENGTH:5", 5),
        ("POST / HTTP/1.1\r\nContent-Length: 007", 7),
        ("GET / HTTP/1.1\r\nHost: x", 0),
        ("POST / HTTP/1.1\r\nX-Content-Length: 5", 0),
        ("POST /content-length:5 HTTP/1.1", 0),
        ("POST / HTTP/1.1\r\nContent-Length: +5", None),
        ("POST / HTTP/1.1\r\nContent-Length: 5, 5", None),
        ("POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 5", None),
        ("POST / HTTP/1.1\r\nContent-Length: 5\r\nX: y\ncontent-length: 6", None),
        ("POST / HTTP/1.1\r\nContent-Length : 5", None),
        ("POST / HTTP/1.1\r\n Content-Length: 5", None),
        ("POST / HTTP/1.1\r\nContent-Length: 1234567890123456", None),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked", None),
        ("POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer_Encoding: chunked", None),
        ("POST / HTTP/1.1\r\nContent-Length: 5\r\ntransfer-encoding : chunked", None),
    ],
)
def test_only_a_single_plain_content_length_is_used(head: str, length: int | None) -> None:
    assert measure(head.encode())[2] == length


def test_heads_that_differ_only_in_content_length_have_the_same_likeness() -> None:
    likenesses = {measure(post(bytes(n))[:-n].partition(b"\r\n\r\n")[0])[0] for n in (3, 45, 678)}
    assert len(likenesses) == 1


def test_bytes_that_a_client_does_not_read_yet_are_kept(pair: Pair, clock: Clock) -> None:
    data = bytes(range(256)) * 20_000
    pair.served.unsent = memoryview(data)
    assert not pair.served.send()
    assert pair.served.state is ConnectionState.WRITING
    assert pair.served.deadline == clock.now + 10
    received = b""
    pair.client.setblocking(False)
    while len(received) < len(data):
        received += pair.client.recv(1 << 20)
        pair.served.send()
    assert received == data


def test_bytes_that_arrive_after_the_last_answer_are_discarded(pair: Pair, clock: Clock) -> None:
    pair.sends(b"POST /")
    pair.served.linger()
    pair.sends(b"x" * 1000)
    assert not pair.served.reader.received
    assert pair.client.recv(1) == b""
    assert pair.served.deadline == clock.now + 2


@pytest.mark.parametrize(("method", "is_upload"), [("POST", True), ("PUT", True), ("GET", False)])
def test_a_post_or_put_is_an_upload(pair: Pair, method: str, is_upload: bool) -> None:
    head = f"{method} /predictions/digits HTTP/1.1\r\nContent-Length: 1\r\n\r\n"
    request = pair.sends(head.encode() + b"x").take()
    assert request is not None
    assert request.is_upload == is_upload
