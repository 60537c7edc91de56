"""The path of a request is the one in its first line, whatever its headers are."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import WAIT_TIMEOUT_S, free_port, wait_for

pytestmark = pytest.mark.e2e


def raw_status(port: int, *headers: str) -> str:
    """The status line of ``GET /livez`` with these headers; empty if the port does not answer."""
    lines = ("GET /livez HTTP/1.1", "Host: x", *headers, "Connection: close", "", "")
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_TIMEOUT_S) as connection:
            connection.sendall("\r\n".join(lines).encode())
            return connection.makefile("rb").readline().decode().strip()
    except OSError:
        return ""


@pytest.mark.parametrize(
    "command", [("service", "--no-pull"), ("registry", "control")], ids=["service", "control"]
)
def test_no_header_from_loopback_rewrites_the_path(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    port = free_port()
    environment = {
        **os.environ,
        "CONVOY_HOME": str(tmp_path),
        "CONVOY_PORT": str(port),
        "CONVOY_CONTROL_PORT": str(port),
        "CONVOY_WORKERS": "1",
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], env=environment, stdout=log, stderr=log
        )
    try:
        wait_for(lambda: raw_status(port).endswith("200 OK"), (tmp_path / "log").read_text())
        for header in ("SCRIPT_NAME: /livez", "PATH_INFO: /nowhere", "SCRIPT_NAME: /other"):
            assert raw_status(port, header).endswith("200 OK"), header
    finally:
        process.terminate()
        process.wait(WAIT_TIMEOUT_S)
