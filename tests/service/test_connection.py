"""Where a request ends, and how long a client may take for it: on socket pairs, without a loop."""

import contextlib
import socket
from collections.abc import Iterator

import psutil
import pytest

from service.server.connection import (
    MAX_HEAD_BYTES,
    MIN_BYTES_PER_S,
    RECEIVE_BYTES,
    Connection,
    ConnectionState,
    HeadTooLong,
    Limits,
    measure,
)


class Pair:
    def __init__(self) -> None:
        self.client, ours = socket.socketpair()
        self.ours = Connection(ours, None, None, Limits(max_body_bytes=1000, keep_alive_s=60))

    def sends(self, data: bytes) -> Connection:
        self.client.sendall(data)
        self.ours.receive()
        return self.ours

    def close(self) -> None:
        self.client.close()
        self.ours.sock.close()


@pytest.fixture
def pair(clock: "Clock") -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


class Clock:
    """The connections' monotonic clock, which only these tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("service.server.connection.time", made)
    return made


def post(body: bytes, extra: str = "") -> bytes:
    return f"POST / HTTP/1.1\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


def test_a_request_is_taken_once_all_of_it_is_there(pair: Pair) -> None:
    whole = post(b"hello")
    for end in range(1, len(whole)):
        pair.sends(whole[end - 1 : end])
        assert pair.ours.take() is None
        assert pair.ours.state is ConnectionState.READING
    asked = pair.sends(whole[-1:]).take()
    assert asked is not None
    assert (asked.body, asked.digits, asked.complete) == (b"hello", "5", True)
    assert asked.is_upload
    assert pair.ours.take() is None


def test_requests_behind_each_other_are_taken_one_by_one(pair: Pair) -> None:
    pair.sends(post(b"one") + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + post(b"two")[:-1])
    bodies = [asked.body for asked in (pair.ours.take(), pair.ours.take()) if asked]
    assert bodies == [b"one", b""]
    assert pair.ours.take() is None
    asked = pair.sends(b"o").take()
    assert asked is not None
    assert asked.body == b"two"


def test_a_large_body_is_whole_and_ends_where_it_ends(pair: Pair) -> None:
    pair.ours.limits = Limits()
    body = bytes(range(256)) * 2000
    whole = post(body)
    pair.sends(whole[:100_000])
    assert pair.ours.take() is None
    for start in range(100_000, len(whole), 100_000):
        pair.sends(whole[start : start + 100_000])
        asked = pair.ours.take()
    assert asked is not None
    assert asked.body[:] == body
    assert asked.open_body().read(len(body)) == body
    assert pair.ours.received_bytes == 0
    asked = pair.sends(post(b"next")).take()
    assert asked is not None
    assert asked.body == b"next"


def test_requests_behind_each_other_do_not_pile_up(pair: Pair) -> None:
    pair.client.setblocking(False)
    asked = b"GET / HTTP/1.1\r\n\r\n"
    for _ in range(300):
        with contextlib.suppress(BlockingIOError):
            pair.client.send(asked * 4000)
        pair.ours.receive()
        assert pair.ours.take() is not None
    assert pair.ours.received_bytes < 2 * RECEIVE_BYTES


def test_a_request_has_ten_seconds_and_the_time_that_its_bytes_earn(
    pair: Pair, clock: Clock
) -> None:
    assert pair.ours.deadline == clock.now + 60  # keep_alive_s
    whole = post(bytes(900))
    began = clock.now
    for start in range(0, 900, 100):
        pair.sends(whole[start : start + 100])
        pair.ours.take()
        assert pair.ours.deadline <= began + 10 + (start + 100) / MIN_BYTES_PER_S
        clock.now += 1
    assert pair.ours.deadline > began + 10


def test_a_length_that_is_only_announced_earns_no_time(pair: Pair, clock: Clock) -> None:
    pair.ours.limits = Limits()
    pair.sends(b"POST / HTTP/1.1\r\nContent-Length: 67000000\r\n\r\n")
    assert pair.ours.take() is None
    assert pair.ours.deadline < clock.now + 11


def test_bytes_that_came_fast_earn_no_pause(pair: Pair, clock: Clock) -> None:
    pair.ours.limits = Limits()
    pair.sends(b"POST / HTTP/1.1\r\nContent-Length: 67000000\r\n\r\n" + bytes(50_000))
    pair.ours.received += bytes(40_000_000)  # more than a socket pair holds
    pair.ours.take()
    assert pair.ours.deadline == clock.now + 10


def test_slow_clients_are_closed_first_and_fresh_ones_last(clock: Clock) -> None:
    names = ("slow body", "old and idle", "fresh and idle", "fast body", "had its answer")
    pairs = {name: Pair() for name in names}
    clock.now += 30
    pairs["fresh and idle"].ours.rest()
    for name in ("slow body", "fast body"):
        pairs[name].ours.limits = Limits()
        pairs[name].sends(b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
        pairs[name].ours.take()
    pairs["had its answer"].ours.linger()
    clock.now += 2
    pairs["fast body"].sends(bytes(80_000))
    order = sorted(pairs, key=lambda name: pairs[name].ours.closing_order(clock.now))
    assert set(order[:2]) == {"slow body", "had its answer"}
    assert order[2:] == ["old and idle", "fresh and idle", "fast body"]
    for each in pairs.values():
        each.close()


def test_long_heads_are_not_remembered() -> None:
    before = psutil.Process().memory_info().rss
    for number in range(2000):
        measure(b"POST / HTTP/1.1\r\nX: %d" % number + b"y" * 30_000)
    assert psutil.Process().memory_info().rss - before < 20_000_000


def test_an_endless_head_is_refused(pair: Pair) -> None:
    for _ in range(MAX_HEAD_BYTES // 1024 - 1):
        assert pair.sends(b"x" * 1024).take() is None
    with pytest.raises(HeadTooLong):
        pair.sends(b"x" * 1024).take()


def test_a_body_over_the_limit_is_not_waited_for(pair: Pair) -> None:
    asked = pair.sends(post(bytes(1001))[:60]).take()
    assert asked is not None
    assert (asked.complete, asked.body, asked.digits) == (False, b"", "1001")


def test_a_json_body_over_its_own_limit_is_not_waited_for(pair: Pair) -> None:
    pair.ours.limits = Limits(max_body_bytes=1000, max_json_bytes=100)
    head = "POST / HTTP/1.1\r\nContent-Length: 101\r\nContent-Type:{}\r\n\r\n"
    asked = pair.sends(head.format("Application/JSON; charset=utf-8").encode()).take()
    assert asked is not None
    assert (asked.complete, asked.digits) == (False, "101")
    assert pair.sends(head.format("image/png").encode()).take() is None


def test_a_client_that_expects_to_be_told_is_told_once(pair: Pair) -> None:
    whole = post(b"hello", "Expect: 100-Continue\r\n")
    pair.sends(whole[:-5])
    assert pair.ours.take() is None
    assert pair.ours.expects()
    assert not pair.ours.expects()
    asked = pair.sends(whole[-5:]).take()
    assert asked is not None
    assert asked.body == b"hello"
    assert b"Expect" not in asked.head
    asked = pair.sends(whole).take()
    assert asked is not None
    assert b"Expect" not in asked.head
    assert not pair.ours.expects()


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
def test_only_one_plain_length_counts(head: str, length: int | None) -> None:
    assert measure(head.encode())[2] == length


def test_heads_that_differ_in_length_only_are_alike() -> None:
    likenesses = {measure(post(bytes(n))[:-n].partition(b"\r\n\r\n")[0])[0] for n in (3, 45, 678)}
    assert len(likenesses) == 1


def test_what_a_client_does_not_take_is_kept_for_it(pair: Pair, clock: Clock) -> None:
    data = bytes(range(256)) * 20_000
    pair.ours.unsent = memoryview(data)
    assert not pair.ours.send()
    assert pair.ours.state is ConnectionState.WRITING
    assert pair.ours.deadline == clock.now + 10
    received = b""
    pair.client.setblocking(False)
    while len(received) < len(data):
        received += pair.client.recv(1 << 20)
        pair.ours.send()
    assert received == data


def test_after_the_last_answer_what_still_comes_is_thrown_away(pair: Pair, clock: Clock) -> None:
    pair.sends(b"POST /")
    pair.ours.linger()
    pair.sends(b"x" * 1000)
    assert not pair.ours.received
    assert pair.client.recv(1) == b""
    assert pair.ours.deadline == clock.now + 2


@pytest.mark.parametrize(("method", "is_upload"), [("POST", True), ("PUT", True), ("GET", False)])
def test_a_request_that_brings_a_body_is_not_a_probe(
    pair: Pair, method: str, is_upload: bool
) -> None:
    head = f"{method} /predictions/digits HTTP/1.1\r\nContent-Length: 1\r\n\r\n"
    asked = pair.sends(head.encode() + b"x").take()
    assert asked is not None
    assert asked.is_upload == is_upload
