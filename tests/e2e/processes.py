"""Real processes for the end-to-end tests: the command lines, and a service on a free port."""

import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import WAIT_TIMEOUT_S, free_port


def run(paths: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The result of a command line, run as a user would type it."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "CONVOY_HOME": str(paths), "CONVOY_PLAN": "torch-eager"},
        capture_output=True,
        text=True,
        timeout=WAIT_TIMEOUT_S,
    )


class Service:
    """``python -m service`` on a free port."""

    def __init__(
        self, paths: Path, *arguments: str, module: tuple[str, ...] = ("service",), **more: str
    ) -> None:
        """Start the service.

        Args:
            paths: its home.
            arguments: of the command line.
            module: the module to run in place of ``service``, with its first arguments.
            more: environment variables.
        """
        self.port = free_port()
        self.log = paths / "service.log"
        environment = {
            **os.environ,
            "CONVOY_HOME": str(paths),
            "CONVOY_PORT": str(self.port),
            "CONVOY_MODEL": "models:/digits@champion",
            "CONVOY_WORKERS": "2",
            "CONVOY_PLAN": "torch-eager",
            **more,
        }
        self.workers = int(environment["CONVOY_WORKERS"])
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", *module, *arguments],
                env=environment,
                stdout=log,
                stderr=log,
            )

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON of an answer. Each call opens a connection, so any worker may answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_TIMEOUT_S)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"{}")
        finally:
            connection.close()

    def text(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_TIMEOUT_S)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def is_ready(self) -> bool:
        """Whether every worker serves. Asks each, as one may be ready while another still loads."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            if self.ask("GET", "/readyz")[0] != 200:
                return False
            workers = self.ask("GET", "/v1/models/digits")[1].get("workers", [])
        except OSError:
            return False
        return [each["version"] is None for each in workers] == [False] * self.workers

    def stop(self) -> int:
        """Send SIGTERM, and return the exit status once every process of the service has ended."""
        family = [self.process, *self.process.children(recursive=True)]
        self.process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=WAIT_TIMEOUT_S)
        for process in alive:
            process.kill()
        assert not alive, self.log.read_text()
        return int(self.process.returncode)
