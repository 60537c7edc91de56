"""The closed-loop load counts only right answers, and a failure marks the row in the report."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from benchmarks.closed_loop import Figures, drive, explain, failures, load, post
from benchmarks.common import machine
from benchmarks.serving_report import conclude
from tests.conftest import free_port

SECONDS = 0.5
BOOT, BAG = frozenset({"boot"}), frozenset({"bag"})
Respond = Callable[[bytes], tuple[int, Any] | None]
"""Status and JSON for a body; None closes the connection without an answer."""


@contextmanager
def server(respond: Respond) -> Iterator[int]:
    """The port of a server on loopback that answers every POST with ``respond``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            answer = respond(self.rfile.read(int(self.headers["Content-Length"])))
            if answer is None:
                self.close_connection = True
                return
            status, content = answer
            body = json.dumps(content, separators=(",", ":")).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield listening.server_address[1]
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


def named(label: str) -> dict[str, Any]:
    return {"predictions": [{"label": label, "index": 0, "probability": 0.9}]}


def echo(body: bytes) -> tuple[int, Any]:
    """The right answer: the body is its label."""
    return 200, named(body.decode())


def half_refused() -> Respond:
    turn = count()
    return lambda body: echo(body) if next(turn) % 2 else (503, {"title": "overload"})


def ask(port: int, connections: int = 3) -> Figures:
    return drive(port, connections, SECONDS, [post(b"boot", [BOOT]), post(b"bag", [BAG])])


def test_right_answers_are_counted_and_timed() -> None:
    with server(echo) as port:
        row = load(port, 3, SECONDS, [post(b"boot", [BOOT]), post(b"bag", [BAG])])
    assert failures(row) == {}
    assert 0 < row["rps"] * SECONDS <= row["right"]
    assert 0 < row["p50_ms"] <= row["p99_ms"]


def test_refused_requests_do_not_count_as_requests_per_second() -> None:
    with server(half_refused()) as port:
        row = ask(port)
    assert row["rps"] * SECONDS <= row["right"]
    assert row["refused"] == pytest.approx(row["right"], abs=3)
    assert "refused" in explain(row)


def test_an_answer_for_another_picture_is_wrong() -> None:
    with server(lambda body: (200, named("bag"))) as port:
        row = ask(port)
    assert row["wrong"] == pytest.approx(row["right"], abs=3)
    assert row["rps"] * SECONDS <= row["right"]


@pytest.mark.parametrize("content", [{}, {"predictions": []}, [], {"results": [named("boot")]}])
def test_an_answer_without_the_wanted_predictions_is_wrong(content: Any) -> None:
    with server(lambda body: (200, content)) as port:
        row = drive(port, 1, SECONDS, [post(b"two", [BOOT, BOOT])])
    assert (row["rps"], row["right"]) == (0, 0)
    assert row["wrong"] > 0


def test_every_picture_of_a_request_must_be_right() -> None:
    results = {"results": [named("boot"), named("bag")]}
    with server(lambda body: (200, results)) as port:
        right = drive(port, 1, SECONDS, [post(b"two", [BOOT, BAG])])
        wrong = drive(port, 1, SECONDS, [post(b"two", [BOOT, BOOT])])
    assert failures(right) == {}
    assert right["right"] > 0
    assert (wrong["right"], set(failures(wrong))) == (0, {"wrong"})


def test_server_errors_lost_answers_and_refused_connections_are_counted_separately() -> None:
    with server(lambda body: (500, {})) as port:
        assert set(failures(ask(port))) == {"errors"}
    with server(lambda body: None) as port:
        assert set(failures(ask(port))) == {"lost"}
    row = ask(free_port())
    assert set(failures(row)) == {"not_connected"}
    assert row["rps"] == 0


def test_the_load_waits_for_open_requests_at_the_end_and_times_them() -> None:
    def late(body: bytes) -> tuple[int, Any]:
        time.sleep(2 * SECONDS)  # so that every answer comes after the end of the load
        return echo(body)

    with server(late) as port:
        row = ask(port)
    assert (row["rps"], failures(row)) == (0, {})
    assert row["right"] > 0
    assert row["p50_ms"] >= 1000 * SECONDS


def test_a_large_request_is_sent_in_pieces() -> None:
    big = b"x" * 20_000_000
    with server(lambda body: (200, named("boot" if body == big else "cut"))) as port:
        row = drive(port, 2, SECONDS, [post(big, [BOOT])])
    assert failures(row) == {}
    assert row["right"] > 0


def workload(convoy: Figures, textbook: Figures) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and details in the form that ``benchmarks.serving`` makes."""
    others = ("textbook", "textbook_same_engine", "fastapi", "noop")
    rows = {
        "convoy": dict.fromkeys(("1", "8", "32", "128", "512"), convoy),
        **{name: dict.fromkeys(("1", "8", "32"), textbook) for name in others},
    }
    details = {
        "model": "fashion",
        "plan": "torch-eager",
        "many in a request": convoy | {"pictures": 32},
        "stages, mean ms": {"decode": 0.1},
        "start to ready, s": 1.0,
        "memory of the process tree per worker, MB": 100.0,
    }
    return {"w1": rows}, {"where": machine(), "w1": details}


@pytest.mark.parametrize("broken", ["refuses half", "answers wrongly"])
def test_a_row_with_failures_is_excluded_from_ratios_and_fails_the_run(
    broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    respond = half_refused() if broken == "refuses half" else lambda body: (200, named("bag"))
    with server(echo) as good, server(respond) as bad:
        clean, failing = ask(good), ask(bad)
    assert conclude(*workload(clean, clean), None) == 0
    table = capsys.readouterr().out
    assert "✗" not in table
    assert "not measured" not in table

    for rows, file in (((failing, clean), None), ((clean, failing), tmp_path / "serving.json")):
        assert conclude(*workload(*rows), file) == 1
        printed = capsys.readouterr()
        ratios = [line for line in printed.out.splitlines() if "/ textbook" in line]
        assert ratios
        assert all("not measured" in line for line in ratios)
        assert "✗" in printed.out
        assert "FAILED w1: " in printed.err
    assert json.loads((tmp_path / "serving.json").read_text())["where"] == machine()
    assert (tmp_path / "serving.png").stat().st_size > 0


def test_the_load_connects_again_when_the_server_closes_after_each_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        body = json.dumps(named("boot")).encode()
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    if not connection.recv(10_000):
                        return
                    connection.sendall(head + body)

        thread = threading.Thread(target=serve)
        thread.start()
        row = drive(listener.getsockname()[1], 1, SECONDS, [post(b"boot", [BOOT])])
        with socket.create_connection(listener.getsockname()) as last:
            last.shutdown(socket.SHUT_WR)
            thread.join()
    assert failures(row) == {}
    assert row["right"] > 1
