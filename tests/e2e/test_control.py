"""The control plane as a process of its own, without a service."""

import http.client
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import WAIT_TIMEOUT_S, free_port, wait_for
from tests.e2e.processes import run

pytestmark = pytest.mark.e2e


@pytest.fixture
def port(paths: Path) -> Iterator[int]:
    port = free_port()
    environment = {**os.environ, "CONVOY_HOME": str(paths), "CONVOY_CONTROL_PORT": str(port)}
    with (paths / "control.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "registry", "control"], env=environment, stdout=log, stderr=log
        )
    try:
        wait_for(lambda: ask(port, "/livez")[0] == 200, "the control plane did not start")
        yield port
        process.terminate()
        assert process.wait(WAIT_TIMEOUT_S) == 0
    finally:
        process.kill()
        process.wait()


def ask(port: int, path: str, token: str = "") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_TIMEOUT_S)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except OSError:
        return 0, ""
    finally:
        connection.close()


def test_it_answers_clients_with_a_token_and_silent_clients_do_not_block_it(
    paths: Path, port: int
) -> None:
    made = run(paths, "registry", "token", "add", "ann", "--role", "viewer")
    token = made.stdout.strip()
    assert "ann" in run(paths, "registry", "token", "list").stdout
    assert ask(port, "/v1/models")[0] == 401
    status, body = ask(port, "/v1/models", token)
    assert (status, '"name":"digits"' in body) == (200, True)
    assert ask(port, "/v1/models/digits/traffic", token)[0] == 503  # no service is running
    assert ask(port, "/login")[0] == 200

    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    try:
        for each in silent:
            each.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n")
        wait_for(lambda: ask(port, "/livez")[0] == 200, "silent clients block the control plane")
    finally:
        for each in silent:
            each.close()
    assert run(paths, "registry", "token", "remove", "ann").returncode == 0
    assert ask(port, "/v1/models", token)[0] == 401
