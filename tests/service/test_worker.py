"""The worker's loop, in a real gunicorn that serves a small application of these tests."""

import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from gunicorn.config import Config

from service.server.pending_response import PendingResponse
from service.server.sockets.request_reader import RawRequest
from tests.conftest import free_port

APPLICATION = """
import json, os, threading, time
from service.server.protocol import ENDING, IN_LOOP, WAITING, Postpone

called = []
calls = 0
waits = threading.Event()

def application(environ, start_response):
    global calls
    calls += 1
    body = environ["wsgi.input"].read() if environ["PATH_INFO"] != "/unread" else b""
    in_loop = IN_LOOP in environ
    overloaded = environ.get(WAITING, 0) >= 12
    if environ.get(IN_LOOP, 0) > 64 * 1024:
        raise Postpone
    if environ["REQUEST_METHOD"] == "GET" and in_loop and environ["PATH_INFO"] != "/probe":
        raise Postpone(background=True)
    if body == b"refuse" or environ["PATH_INFO"] == "/not-ready":
        start_response("503 Busy", [("Content-Length", "0"), ("Retry-After", "1")])
        return []
    if environ["PATH_INFO"] == "/held":
        waits.wait(60)
    if body.startswith(b"ss") and not in_loop:
        time.sleep(0.5)
    if body == b"slow" and in_loop and not overloaded:
        raise Postpone
    if body == b"let go":
        waits.set()
    if body == b"raise":
        raise ValueError("in the call")
    if body == b"hold up":
        time.sleep(1.2)
    called.append(body)
    if body == b"bad close":
        class BadClose(list):
            def close(self):
                raise ValueError("in the close")

        start_response("200 OK", [("Content-Length", "2")])
        return BadClose([b"{}"])

    def answer():
        if body == b"raise later":
            raise ValueError("in the iteration")
        if body == b"slow" and not overloaded:
            time.sleep(0.3)
        text = {
            "body": body.decode()[:20],
            "length": len(body),
            "calls": calls,
            "port": environ["REMOTE_PORT"],
            "content_length": environ["CONTENT_LENGTH"] if body else None,
            "in_loop": IN_LOOP in environ,
            "overloaded": overloaded,
            "ending": ENDING in environ,
            "pid": os.getpid(),
            "thread": threading.current_thread().name,
            "called_before_answered": len(called),
        }
        called.clear()
        data = json.dumps(text).encode()
        if body == b"large":
            data = b"x" * 20_000_000
        start_response("200 OK", [("Content-Length", str(len(data)))])
        yield data

    return answer()
"""

STUCK_COMPANION = """
import os, runpy, threading
from pathlib import Path
from msgspec.structs import replace

found = runpy.run_path("service/gunicorn.conf.py")
globals().update(found)

class Stuck:
    def start(self):
        pass

    def end(self, delay_s, grace_s):
        pass

    def join(self, timeout_s=None):
        threading.Event().wait(timeout_s)

def post_fork(server, worker):
    found["post_fork"](server, worker)
    worker.options = replace(worker.options, companion=lambda application: Stuck())

def worker_exit(server, worker):
    Path(os.environ["REACHED"]).touch()
"""

GUNICORN = [sys.executable, "-m", "gunicorn", "-c", "service/gunicorn.conf.py", "--workers", "1"]


OPENED: list["Connection | Server"] = []


class Server:
    """gunicorn with one worker, which serves the small application."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        (folder / "small_application.py").write_text(APPLICATION)
        self.port = free_port()
        command = [*GUNICORN, "--threads", "4", "--keep-alive", "4"]
        command += ["--bind", f"127.0.0.1:{self.port}", "--pythonpath", str(folder)]
        self.process = subprocess.Popen(
            [*command, *arguments, "small_application:application"],
            env={**os.environ, **environment},
        )
        OPENED.append(self)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                break
            time.sleep(0.05)

    def close(self) -> None:
        if self.process.poll() is None:
            self.stop()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)  # gunicorn itself would wait 30 s for open connections


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    server = Server(tmp_path_factory.mktemp("application"))
    OPENED.remove(server)  # all tests of the module share it
    yield server.port
    server.stop()


@pytest.fixture(autouse=True)
def _close_what_is_open() -> Iterator[None]:
    """Close what a failed test left open, because a later test would warn about it."""
    yield
    while OPENED:
        OPENED.pop().close()


class Connection:
    """A keep-alive connection of a client, which sends bytes unchanged."""

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 60, (source, 0))
        self.file = self.socket.makefile("rb")
        OPENED.append(self)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> tuple[int, bytes]:
        line = self.file.readline()
        if not line:
            raise ConnectionResetError("closed without an answer")
        status = int(line.split()[1])
        length = 0
        self.closing = False
        while (line := self.file.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
            self.closing |= line.lower().startswith(b"connection: close")
        return status, self.file.read(length)

    def ask(self, body: bytes, **options: str) -> dict[str, Any]:
        self.send(post(body, **options))
        status, data = self.answer()
        assert status == 200
        found: dict[str, Any] = json.loads(data)
        return found

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def is_closed(self) -> bool:
        return self.file.read(1) == b""

    def has_ended(self) -> bool:
        """Whether the server has already closed it; does not wait."""
        self.socket.setblocking(False)
        try:
            return self.socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        finally:
            self.socket.settimeout(60)


@pytest.fixture
def connection(port: int) -> Iterator[Connection]:
    opened = Connection(port)
    yield opened
    opened.close()


def post(body: bytes, path: str = "/", extra: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


def test_the_loop_answers_every_small_post(connection: Connection) -> None:
    for number in range(5):
        answer = connection.ask(b"picture %d" % number)
        assert answer["in_loop"]
        assert answer["thread"] == "MainThread"
        assert answer["body"] == f"picture {number}"


def test_each_option_in_a_connection_header_counts(port: int) -> None:
    for options, closes in (
        ("TE, close", True),
        ("close, TE", True),
        ("keep-alive, TE", False),
        ("TE", False),
    ):
        connection = Connection(port)
        connection.ask(b"picture", extra=f"Connection: {options}\r\n")
        assert connection.closing is closes
        connection.close()


def test_the_application_is_called_for_all_waiting_requests_before_the_first_answer(
    port: int,
) -> None:
    with ThreadPoolExecutor(16) as pool:
        connections = [Connection(port) for _ in range(16)]
        most_called = 0
        for _ in range(20):
            answers = list(pool.map(lambda each: each.ask(b"x"), connections))
            called = (answer["called_before_answered"] for answer in answers)
            most_called = max(most_called, *called)
        for each in connections:
            each.close()
    assert most_called > 1


def test_a_large_request_goes_to_a_thread(connection: Connection) -> None:
    answer = connection.ask(b"x" * 100_000)
    assert (answer["in_loop"], answer["length"]) == (False, 100_000)
    assert connection.ask(b"small again")["in_loop"]


def test_a_slow_request_does_not_delay_other_clients(connection: Connection, port: int) -> None:
    request = post(b"in two parts")
    connection.send(request[:-5])
    other = Connection(port)
    for _ in range(3):
        assert other.ask(b"meanwhile")["in_loop"]
    other.close()
    connection.send(request[-5:])
    status, data = connection.answer()
    assert (status, json.loads(data)["body"]) == (200, "in two parts")
    assert connection.ask(b"small again")["in_loop"]


def test_a_thread_calls_the_application_again_for_a_postponed_request(
    connection: Connection, port: int
) -> None:
    connection.send(post(b"slow"))
    other = Connection(port)
    assert other.ask(b"meanwhile")["in_loop"]
    other.close()
    status, data = connection.answer()
    assert (status, json.loads(data)["in_loop"]) == (200, False)
    assert connection.ask(b"small again")["in_loop"]


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def test_background_threads_do_the_background_work(connection: Connection) -> None:
    connection.send(get("/"))
    answer = json.loads(connection.answer()[1])
    assert answer["in_loop"] is False
    assert answer["thread"].startswith("background")


def test_probes_and_posts_do_not_wait_for_background_work(tmp_path: Path) -> None:
    server = Server(tmp_path)
    pages = [Connection(server.port) for _ in range(40)]
    for each in pages:
        each.send(get("/held"))
    connection = Connection(server.port)
    for _ in range(5):
        connection.send(get("/probe"))
        assert json.loads(connection.answer()[1])["in_loop"]
        assert connection.ask(b"picture")["in_loop"]
    connection.ask(b"let go")
    assert [each.answer()[0] for each in pages] == [200] * 40
    for each in (*pages, connection):
        each.close()
    server.stop()


def test_many_refusals_are_sent_in_turn_and_do_not_delay_other_clients(tmp_path: Path) -> None:
    server = Server(tmp_path)
    refused = [Connection(server.port) for _ in range(300)]
    for each in refused:
        each.send(post(b"refuse"))
    served = Connection(server.port)
    served.send(get("/not-ready"))  # a probe's 503 is not delayed
    assert served.answer()[0] == 503
    assert served.ask(b"meanwhile")["in_loop"]
    assert [each.answer()[0] for each in refused] == [503] * 300
    assert refused[0].ask(b"later")["in_loop"]
    for each in (*refused, served):
        each.close()
    server.stop()


def test_one_address_gets_only_its_share_of_the_connections(tmp_path: Path) -> None:
    server = Server(tmp_path, GUNICORN_CMD_ARGS="--worker-connections 40")
    honest = Connection(server.port, source="127.0.0.2")
    honest.ask(b"here")
    stalled = [Connection(server.port) for _ in range(60)]
    for each in stalled:
        with contextlib.suppress(ConnectionError):
            each.send(post(b"x" * 1000)[:60])
    assert honest.ask(b"still here")["in_loop"]
    later = Connection(server.port)  # from the same address: one of its connections is closed
    assert later.ask(b"new")["in_loop"]
    open_ = [each for each in stalled if not each.has_ended()]
    assert 0 < len(open_) <= 30
    for each in (*stalled, honest, later):
        each.close()
    server.stop()


def test_one_connection_too_many_from_an_address_closes_one_of_them(tmp_path: Path) -> None:
    server = Server(tmp_path, CONVOY_MAX_CONNECTIONS_PER_ADDRESS="5")
    many: list[Connection] = []
    # One after the other: the server may still hold the connection that found it started.
    for _ in range(5):
        many.append(Connection(server.port))
        many[-1].ask(b"here")
    for each in many:
        each.send(post(b"x" * 1000)[:60])
    witness = Connection(server.port, "127.0.0.2")
    for _ in range(2):  # once these are answered, the server has read what came before
        witness.ask(b"read")
    newcomer = Connection(server.port)
    assert newcomer.ask(b"new")["body"] == "new"
    assert sum(each.has_ended() for each in many) == 1
    for each in (*many, witness, newcomer):
        each.close()
    server.stop()


def test_a_trusted_proxy_may_have_all_connections(tmp_path: Path) -> None:
    arguments = "--worker-connections 40"
    server = Server(tmp_path, GUNICORN_CMD_ARGS=arguments, CONVOY_TRUSTED_PROXIES="127.0.0.0/8")
    many = [Connection(server.port) for _ in range(39)]
    for each in many:
        each.ask(b"here")
    assert [each.ask(b"on")["body"] for each in many] == ["on"] * 39
    for each in many:
        each.close()
    server.stop()


@pytest.mark.parametrize("body", [b"raise", b"raise later", b"bad close"])
def test_an_application_that_raises_fails_only_that_request(
    connection: Connection, port: int, body: bytes
) -> None:
    connection.send(post(body))
    assert connection.answer()[0] == 500
    other = Connection(port)
    assert other.ask(b"after it")["in_loop"]
    other.close()


def test_an_unread_body_does_not_become_the_next_request(connection: Connection) -> None:
    for _ in range(2):
        assert connection.ask(b"GET /x HTTP/1.1\r\n\r\n", path="/unread")["length"] == 0
    assert connection.ask(b"next")["body"] == "next"


def test_pipelined_requests_are_answered_in_order(
    connection: Connection,
) -> None:
    connection.send(post(b"first") + post(b"second") + post(b"third"))
    connection.send(post(b"fourth"))
    answers = [json.loads(connection.answer()[1])["body"] for _ in range(4)]
    assert answers == ["first", "second", "third", "fourth"]
    assert connection.ask(b"fifth")["in_loop"]


def test_the_start_of_a_pipelined_request_is_not_lost(connection: Connection) -> None:
    second = post(b"in two parts")
    connection.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + second[:-4])
    assert json.loads(connection.answer()[1])["body"] == ""
    connection.send(second[-4:] + post(b"third"))
    answers = [json.loads(connection.answer()[1])["body"] for _ in range(2)]
    assert answers == ["in two parts", "third"]


def test_a_client_that_closes_its_sending_side_is_answered(connection: Connection) -> None:
    connection.send(post(b"last words"))
    connection.socket.shutdown(socket.SHUT_WR)
    assert json.loads(connection.answer()[1])["body"] == "last words"
    assert connection.is_closed()


def test_requests_pipelined_before_the_client_stops_sending_are_answered(
    connection: Connection,
) -> None:
    connection.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + post(b"second") + post(b"third"))
    connection.socket.shutdown(socket.SHUT_WR)
    answers = [json.loads(connection.answer()[1])["body"] for _ in range(3)]
    assert answers == ["", "second", "third"]
    assert connection.is_closed()


def test_idle_connections_do_not_delay_the_shutdown(tmp_path: Path) -> None:
    server = Server(tmp_path)
    silent, idle = Connection(server.port), Connection(server.port)
    idle.ask(b"once")
    server.stop()  # fails if the worker waits for idle connections
    assert idle.is_closed()
    for each in (silent, idle):
        each.close()


def test_a_client_that_left_while_it_waited_causes_no_work(
    port: int, connection: Connection
) -> None:
    """Only after a wait of a second: until then, a client may close only its sending side."""
    slow, *leaving = (Connection(port) for _ in range(4))
    for each in (slow, *leaving):
        each.ask(b"here")
    before = connection.ask(b"one")["calls"]
    connection.send(post(b"hold up"))
    time.sleep(0.1)
    slow.send(post(b"hold up"))  # the next request; while it is worked on, the others wait
    for each in leaving:
        each.send(post(b"gone"))
        each.close()
    assert [each.answer()[0] for each in (connection, slow)] == [200, 200]
    assert connection.ask(b"two")["calls"] == before + 3
    slow.close()


def test_a_cached_head_keeps_no_facts_of_another_connection(
    port: int, connection: Connection
) -> None:
    other = Connection(port)
    for each in (connection, other, connection, other):
        answer = each.ask(b"12345", extra="X-Same: yes\r\n")
        assert answer["body"] == "12345"
        assert answer["port"] == str(each.socket.getsockname()[1])
    other.close()
    for body in (b"", b"123", b"1234567890", b"123"):
        answer = connection.ask(body, extra="X-Same: yes\r\n")
        assert (answer["length"], answer["body"]) == (len(body), body.decode())
        assert answer["content_length"] == (str(len(body)) if body else None)
    connection.send(post(b"12345", extra="X-Bad\r\n"))
    assert connection.answer()[0] == 400


def test_a_head_with_two_lengths_is_refused_every_time(port: int) -> None:
    for second in ("5", "7", "5"):
        opened = Connection(port)
        opened.send(post(b"12345", extra=f"Content-Length: {second}\r\n"))
        assert opened.answer()[0] == 400
        opened.close()


def test_connection_close_is_honoured(connection: Connection) -> None:
    assert connection.ask(b"last", extra="Connection: close\r\n")["in_loop"]
    assert connection.is_closed()


def test_a_silent_connection_is_closed_after_the_keep_alive_time(connection: Connection) -> None:
    connection.ask(b"once")
    assert connection.is_closed()


def test_a_client_that_does_not_read_does_not_delay_others(
    connection: Connection, port: int
) -> None:
    connection.send(post(b"large"))
    time.sleep(0.2)  # the answer fills the socket's buffers
    other = Connection(port)
    assert other.ask(b"meanwhile")["in_loop"]
    other.close()
    assert len(connection.answer()[1]) == 20_000_000
    assert connection.ask(b"small again")["in_loop"]


def test_a_malformed_request_is_400(connection: Connection) -> None:
    connection.send(b"POST / HTTP/9.9\r\nContent-Length: 0\r\nBad Header: x\r\n\r\n")
    assert connection.answer()[0] == 400


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("POST / HTTP/1.1\r\nContent-Length: 0", 400),  # no Host
        ("POST / HTTP/1.1\r\nHost: x\r\nHost: y\r\nContent-Length: 0", 400),
        ("POST / HTTP/1.9\r\nHost: x\r\nContent-Length: 0", 400),
        ("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: odd\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: x\r\nX: " + "y" * 40_000, 431),
        ("POST / HTTP/1.1\r\nHost: x\r\n" + "X: y\r\n" * 200 + "Content-Length: 0", 431),
    ],
)
def test_an_ambiguous_or_too_long_head_is_refused(
    connection: Connection, head: str, status: int
) -> None:
    connection.send(head.encode() + b"\r\n\r\n")
    assert connection.answer()[0] == status
    assert connection.is_closed()


@pytest.mark.parametrize("extra", ["Transfer-Encoding: chunked\r\n", "Content-Length: +5\r\n"])
def test_no_request_is_read_after_a_body_of_unknown_length(
    connection: Connection, extra: str
) -> None:
    head = f"POST / HTTP/1.1\r\nHost: x\r\n{extra}\r\n"
    connection.send(head.encode() + b"0\r\n\r\n" + post(b"smuggled"))
    connection.answer()
    assert connection.is_closed()


def test_a_client_that_expects_100_continue_gets_it(connection: Connection) -> None:
    request = post(b"x" * 100_000, extra="Expect: 100-continue\r\n")
    head, _, body = request.partition(b"\r\n\r\n")
    connection.send(head + b"\r\n\r\n")
    assert connection.file.readline() == b"HTTP/1.1 100 Continue\r\n"
    assert connection.file.readline() == b"\r\n"
    connection.send(body)
    assert json.loads(connection.answer()[1])["length"] == 100_000


def test_hundreds_of_slow_clients_do_not_delay_others(port: int, connection: Connection) -> None:
    slow = [Connection(port) for _ in range(300)]
    for number, each in enumerate(slow):
        each.send(post(b"x" * 100_000)[: 10 + number])
    for number in range(20):
        for each in slow:
            each.send(b"x")
        started = time.monotonic()
        assert connection.ask(b"%d" % number)["in_loop"]
        assert connection.ask(b"y" * 100_000)["length"] == 100_000
        assert time.monotonic() - started < 1
    for each in slow:
        each.close()


@pytest.mark.slow
def test_a_request_that_arrives_too_slowly_is_408(connection: Connection) -> None:
    started = time.monotonic()
    connection.send(b"POST / HTTP/1.1\r\nHo")
    status, body = connection.answer()
    assert (status, len(json.loads(body)["request_id"])) == (408, 32)
    assert connection.is_closed()
    assert 9 < time.monotonic() - started < 12


def test_the_application_can_refuse_at_once_if_many_requests_wait(port: int) -> None:
    many = [Connection(port) for _ in range(20)]
    for each in many:
        each.send(post(b"slow"))
    answers = [json.loads(each.answer()[1]) for each in many]
    refused = [each for each in answers if each["overloaded"]]
    assert len(refused) == 20 - 12
    assert all(each["in_loop"] for each in refused)
    for each in many:
        each.close()


def test_clients_that_send_all_the_time_lose_no_request_when_the_worker_ends(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path)

    def send_until_refused() -> int:
        count = 0
        while True:
            try:
                client = Connection(server.port)
            except ConnectionRefusedError:
                return count
            open_ = True
            while open_:
                client.send(post(b"x" * 70_000 if count % 5 == 0 else b"x"))
                status, _ = client.answer()
                assert status == 200
                count += 1
                open_ = not client.closing
            client.close()

    with ThreadPoolExecutor(16) as pool:
        counts = [pool.submit(send_until_refused) for _ in range(16)]
        time.sleep(1)
        server.stop()
    assert all(each.result() > 10 for each in counts)


def test_the_answer_on_an_old_connection_closes_it(tmp_path: Path) -> None:
    server = Server(tmp_path, CONVOY_MAX_CONNECTION_AGE_S="1")
    connection = Connection(server.port)
    for _ in range(2):
        connection.ask(b"x")
        assert not connection.closing
    time.sleep(1.3)  # the age varies by a quarter
    connection.ask(b"x")
    assert connection.closing
    assert connection.is_closed()
    connection.close()
    server.stop()


def test_the_application_learns_of_the_shutdown_while_clients_still_connect(tmp_path: Path) -> None:
    server = Server(tmp_path, CONVOY_SHUTDOWN_DELAY_S="1.5")
    old = Connection(server.port)
    assert not old.ask(b"x")["ending"]
    server.process.terminate()
    time.sleep(0.7)
    new = Connection(server.port)  # still accepted
    assert [each.ask(b"x")["ending"] for each in (old, new, old)] == [True, True, True]
    assert server.process.wait(10) == 0
    assert old.is_closed()
    for each in (old, new):
        each.close()


def test_clients_reach_the_next_worker_when_one_ends(tmp_path: Path) -> None:
    """Here gunicorn's arbiter owns the listener, and gives it to the worker that it starts next."""
    server = Server(tmp_path)
    first = Connection(server.port)
    before = first.ask(b"x")["pid"]
    first.close()
    os.kill(before, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while True:
        with contextlib.closing(Connection(server.port)) as client:
            if client.ask(b"x")["pid"] != before:
                break
        assert time.monotonic() < deadline
    server.stop()


def test_a_client_may_send_at_the_moment_its_connection_is_closed_to_make_room(
    tmp_path: Path,
) -> None:
    """One poll reports a new client, and bytes on the connection that is closed to make room."""
    arguments = "--worker-connections 16"
    server = Server(tmp_path, GUNICORN_CMD_ARGS=arguments, CONVOY_TRUSTED_PROXIES="127.0.0.0/8")
    many = []
    # One after the other: the connection that found the server started is the first to be closed.
    for _ in range(16):
        many.append(Connection(server.port))
        many[-1].ask(b"here")
    many[-1].send(post(b"hold up"))
    time.sleep(0.3)  # both of the following happen while the worker handles that
    newcomer = Connection(server.port)
    many[0].send(post(b"too late"))
    assert newcomer.ask(b"new")["body"] == "new"
    assert many[-1].answer()[0] == 200
    assert [each.ask(b"on")["body"] for each in many[1:]] == ["on"] * 15  # of the same worker
    for each in (*many, newcomer):
        each.close()
    server.stop()


@pytest.mark.parametrize(
    "hostile",
    [
        b"\r\n\r\n",
        b"\r\n" * 100,
        b"\x00" * 50 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\n\r\n",
        post(b"x", extra="Expect: 100-Continue\r\n"),
        post(b"x", extra="Expect: 200-ok\r\n"),
        post(b"x", extra="Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_no_bytes_that_a_client_sends_end_the_worker(
    port: int, connection: Connection, hostile: bytes
) -> None:
    before = connection.ask(b"before")["pid"]
    other = Connection(port)
    other.send(hostile)
    other.socket.shutdown(socket.SHUT_WR)
    assert other.file.read().startswith((b"HTTP/1.1 4", b"HTTP/1.1 200", b"HTTP/1.1 100"))
    other.close()
    assert connection.ask(b"after")["pid"] == before


def test_a_client_that_resets_its_connection_after_a_wait_does_not_end_the_worker(
    port: int, connection: Connection
) -> None:
    slow, leaving = Connection(port), Connection(port)
    for each in (slow, leaving):
        before = each.ask(b"here")["pid"]
    for each in (connection, slow):
        each.send(post(b"hold up"))
        time.sleep(0.1)
    leaving.send(post(b"gone"))
    leaving.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    leaving.close()
    assert [each.answer()[0] for each in (connection, slow)] == [200, 200]
    assert connection.ask(b"after")["pid"] == before
    slow.close()


def test_a_request_that_arrived_in_time_is_not_too_late_when_the_loop_was_busy(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path, GUNICORN_CMD_ARGS="--keep-alive 2")
    busy, patient = Connection(server.port), Connection(server.port)
    patient.ask(b"here")
    time.sleep(1.4)
    busy.send(post(b"hold up"))  # takes 1.2 s, until after the other's deadline
    time.sleep(0.3)
    assert patient.ask(b"in time")["body"] == "in time"
    for each in (busy, patient):
        each.close()
    server.stop()


def test_the_bytes_of_waiting_bodies_are_limited(tmp_path: Path) -> None:
    def send(each: Connection, data: bytes) -> None:
        # The server may have refused the request and closed the connection in the meantime.
        with contextlib.suppress(ConnectionError):
            each.send(data)

    server = Server(tmp_path)
    many = [Connection(server.port) for _ in range(10)]
    request = post(b"s" * 40_000_000)
    with ThreadPoolExecutor(10) as pool:  # no request is complete before all have nearly arrived
        list(pool.map(lambda each: send(each, request[:-1]), many))
    statuses = []
    for each in many:
        send(each, request[-1:])
        with contextlib.suppress(ConnectionError):
            statuses.append(each.answer()[0])
        each.close()
    assert set(statuses) <= {200, 503}
    assert 4 <= statuses.count(200) < 10
    server.stop()


def test_an_empty_length_is_not_taken_for_a_cached_one(connection: Connection) -> None:
    connection.ask(b"12345", extra="X-Empty: yes\r\n")
    connection.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: \r\nX-Empty: yes\r\n\r\n")
    assert connection.answer()[0] == 400


def test_requests_sent_before_the_shutdown_are_answered(tmp_path: Path) -> None:
    """Also if accepting them takes more than one round, and longer than ``IDLE_S``."""
    server = Server(tmp_path)
    holding = Connection(server.port)
    kept = [Connection(server.port) for _ in range(150)]
    for each in kept:
        each.ask(b"x")
    holding.send(post(b"hold up"))
    time.sleep(0.2)
    many = [*kept, *(Connection(server.port) for _ in range(150))]  # not accepted yet
    for each in many:
        each.send(post(b"hold up" if each is kept[0] else b"x"))
    server.process.terminate()
    assert {each.answer()[0] for each in many} == {200}
    for each in (holding, *many):
        each.close()
    server.stop()


def test_clients_that_send_large_bodies_slowly_do_not_keep_out_others(tmp_path: Path) -> None:
    server = Server(tmp_path)
    slow = [Connection(server.port) for _ in range(5)]
    large = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\n" + bytes(55_000_000)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda each: each.send(large), slow))
    honest = Connection(server.port)
    for _ in range(3):
        assert honest.ask(b"s" * 200_000)["length"] == 200_000
    for each in (honest, *slow):
        each.close()
    server.stop()


def test_a_companion_that_does_not_end_leaves_time_for_the_last_records(tmp_path: Path) -> None:
    config, reached = tmp_path / "config.py", tmp_path / "reached"
    config.write_text(STUCK_COMPANION)
    more = {"CONVOY_GRACEFUL_TIMEOUT_S": "3", "REACHED": str(reached)}
    server = Server(tmp_path, "-c", str(config), **more)
    server.stop()
    assert reached.exists()


@pytest.mark.parametrize(("left_s", "at_most_s"), [(float("inf"), 2.0), (1.0, 0.5), (-1.0, 0.0)])
def test_the_last_records_have_only_the_rest_of_the_graceful_time_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_s: float, at_most_s: float
) -> None:
    for name in ("CONVOY_RUN_FOLDER", "PROMETHEUS_MULTIPROC_DIR", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # the configuration sets them
    monkeypatch.setenv("CONVOY_RUN_FOLDER", str(tmp_path))
    timeouts_s: list[float] = []
    recorder = SimpleNamespace(close=timeouts_s.append)
    app = SimpleNamespace(extensions={"convoy": SimpleNamespace(recorder=recorder)})
    worker = SimpleNamespace(wsgi=app, killed_at=time.monotonic() + left_s)
    runpy.run_path("service/gunicorn.conf.py")["worker_exit"](None, worker)
    (timeout_s,) = timeouts_s
    assert 0 <= timeout_s <= at_most_s


def test_a_port_in_use_ends_the_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (tmp_path / "small_application.py").write_text(APPLICATION)
        port = str(taken.getsockname()[1])
        ended = subprocess.run(
            [*GUNICORN, "--pythonpath", str(tmp_path), "small_application:application"],
            env={**os.environ, "CONVOY_PORT": port},
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert ended.returncode == 3
    assert f"cannot listen on 127.0.0.1 port {port}" in ended.stderr


def test_an_answer_is_not_part_of_a_reference_cycle() -> None:
    """Otherwise request bodies would stay in memory until the next garbage collection."""
    raw = RawRequest(b"POST / HTTP/1.1", b"", "4", b"body", True)
    request = SimpleNamespace(version=(1, 1))
    connection: Any = None
    pending = PendingResponse(connection, request, {}, Config(), raw)
    found, to_visit = set(), [pending.response]
    while to_visit:
        for each in gc.get_referents(to_visit.pop()):
            if not isinstance(each, type | ModuleType) and id(each) not in found:
                found.add(id(each))
                to_visit.append(each)
    assert id(pending) not in found


def test_a_body_that_is_only_announced_does_not_delay_the_errors_of_others(tmp_path: Path) -> None:
    server = Server(tmp_path)
    for _ in range(10):
        liar = Connection(server.port)
        liar.send(b"POST /unread HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999999\r\n\r\n")
        assert liar.answer()[0] == 200
        liar.close()
        liar = Connection(server.port)
        liar.send(b"POST /not-ready HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999999\r\n\r\n")
        assert liar.answer()[0] == 503
        liar.close()
    server.stop()


def test_a_client_that_sends_on_after_a_refusal_does_not_delay_errors_of_others(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path)
    head = b"POST /not-ready HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n"
    done = threading.Event()

    def send_on() -> None:
        while not done.is_set():
            sender = Connection(server.port)
            with contextlib.suppress(OSError):
                sender.send(head)
                while not done.is_set():
                    sender.send(bytes(1_000_000))
            sender.close()

    threads = [threading.Thread(target=send_on) for _ in range(4)]
    for each in threads:
        each.start()
    honest = Connection(server.port)
    for _ in range(20):
        honest.send(post(b"refuse"))
        assert honest.answer()[0] == 503
    done.set()
    for each in threads:
        each.join()
    honest.close()
    server.stop()
