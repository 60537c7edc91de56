"""Starts a service on loopback for the benchmarks, and writes their results."""

import argparse
import contextlib
import http.client
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import psutil

from registry.core.devices import CORES, describe_machine

START_TIMEOUT_S = 180.0
SERVER_PORTS = (20_000, 32_000)
FAST_INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16")


def free_port() -> int:
    """A loopback port that no process uses at this moment.

    It is below the range from which the kernel takes ports for clients. A port in that range may
    belong to a client's connection before the server binds it.
    """
    while True:
        port = random.SystemRandom().randrange(*SERVER_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class RunningService:
    """``python -m service`` on a free port of this machine."""

    def __init__(
        self,
        paths: Path,
        model: str,
        workers: int,
        pull: bool,
        plan: str = "auto",
        **more: str,
    ) -> None:
        """Start the service with the environment variables ``more``, and wait until it is ready."""
        self.port = free_port()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long-lived as the service
        self._environment = {
            **os.environ,
            "CONVOY_HOME": str(paths),
            "CONVOY_PORT": str(self.port),
            "CONVOY_MODEL": model,
            "CONVOY_WORKERS": str(workers),
            "CONVOY_PLAN": plan,
            "CONVOY_LOG_LEVEL": "WARNING",
            **more,
        }
        self._command = [sys.executable, "-m", "service", *([] if pull else ["--no-pull"])]
        self.start()

    def start(self) -> None:
        """Start, also after ``stop``, on the same port; returns when the service is ready."""
        started = time.perf_counter()
        self.process = psutil.Popen(
            self._command, env=self._environment, stdout=self._log, stderr=subprocess.STDOUT
        )
        self._wait()
        self.start_to_ready_s = time.perf_counter() - started
        deadline = time.monotonic() + START_TIMEOUT_S
        while not all(map(_listens, self.workers())):  # or all clients would connect to the first
            if time.monotonic() > deadline:
                raise SystemExit(f"a worker does not listen:\n{self.log()[-3000:]}")
            time.sleep(0.01)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def workers(self) -> list[psutil.Process]:
        """gunicorn's workers: the children of the gunicorn that the service started."""
        return list(self.gunicorn().children())

    def gunicorn(self) -> psutil.Process:
        (found,) = [p for p in self.process.children() if "gunicorn" in " ".join(p.cmdline())]
        return found

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            connection = self.connect()
            try:
                connection.request("GET", "/readyz")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            finally:
                connection.close()
            time.sleep(0.01)
        self.process.terminate()
        raise SystemExit(f"the service did not start:\n{self.log()[-3000:]}")


def _listens(worker: psutil.Process) -> bool:
    return any(each.status == psutil.CONN_LISTEN for each in worker.net_connections())


@contextmanager
def running_service(
    paths: Path,
    model: str,
    workers: int = 2,
    pull: bool = False,
    plan: str = "auto",
    **more: str,
) -> Iterator[RunningService]:
    service = RunningService(paths, model, workers, pull, plan, **more)
    try:
        yield service
    finally:
        if service.process.is_running():
            service.stop()


def post_image(connection: http.client.HTTPConnection, image: bytes) -> tuple[int, dict[str, Any]]:
    """Status and body of one classification."""
    headers = {"Content-Type": "application/octet-stream"}
    connection.request("POST", "/v1/classify?top_k=1", image, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


class Connects(Protocol):
    """A running server."""

    def connect(self) -> http.client.HTTPConnection: ...


def served_plan(service: Connects, model: str) -> str:
    """The plan that serves ``model`` now."""
    connection = service.connect()
    connection.request("GET", f"/v1/models/{model}")
    plan: str = json.loads(connection.getresponse().read())["plan"]
    connection.close()
    return plan


def parser(description: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return options


def machine() -> dict[str, Any]:
    """The date, and the machine that measures: part of every result."""
    cpu = describe_machine("cpu")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": f"{cpu['cpu']}, {platform.machine()}",
        "cores": CORES,
        "instructions": " ".join(name for name in cpu["flags"].split() if _decides(name)),
        "python": platform.python_version(),
    }


def _decides(flag: str) -> bool:
    """Whether a plan's speed depends on this instruction set."""
    return flag in FAST_INSTRUCTIONS or flag.startswith("amx_")


def report(figures: dict[str, Any], file: Path | None) -> None:
    """Print ``figures`` and write them, with the date and the machine, to ``file``."""
    width = max(map(len, figures))
    for name, value in figures.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name:<{width}}  {shown}")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**machine(), **figures}, indent=2) + "\n")
