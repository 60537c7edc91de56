"""The HTTP servers of the comparison: each serves the same application with two workers."""

import http.client
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
from msgspec import Struct

from benchmarks.common import START_TIMEOUT_S, free_port, running_service
from benchmarks.serving import HOME, ROOT, WORKERS
from service.settings import METRICS, RUN_FOLDER, Settings

Command = Callable[[int], list[str]]
"""The arguments of ``python -m`` for a server on a port."""

GUNICORN_CONFIG = ROOT / "service" / "gunicorn.conf.py"


class Server(Struct, frozen=True):
    """A running server: its port, and the first process of its tree."""

    port: int
    process: psutil.Process

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def cpu_s(self) -> float:
        """CPU seconds, user and system, of the process tree, including ended processes."""
        tree = [self.process, *self.process.children(recursive=True)]
        return sum(sum(process.cpu_times()[:4]) for process in tree)


def gthread(threads: int) -> Command:
    """gunicorn's own threaded worker, configured like the service otherwise."""
    return lambda port: [
        *("gunicorn", "-c", str(GUNICORN_CONFIG), "--worker-class", "gthread"),
        *("--threads", str(threads), "--bind", f"127.0.0.1:{port}"),
    ]


def granian(threads: int) -> Command:
    """Granian's WSGI interface with this number of blocking threads per worker."""
    return lambda port: [
        *("granian", "--interface", "wsgi", "--factory", "--no-ws", "--http", "1"),
        *("--workers", str(WORKERS), "--blocking-threads", str(threads)),
        *("--backlog", "2048", "--log-level", "warning"),
        *("--host", "127.0.0.1", "--port", str(port)),
        "benchmarks.http_servers.granian_app:create",
    ]


OTHERS = {
    "gthread_8": gthread(8),
    "gthread_32": gthread(32),
    "granian_1": granian(1),
    "granian_8": granian(8),
    "granian_32": granian(32),
}
NAMES = ("convoy", *OTHERS)


@contextmanager
def running(names: Sequence[str], model: str, plan: str) -> Iterator[dict[str, Server]]:
    """The servers ``names``, ready to serve ``model`` with ``plan``."""
    with ExitStack() as stack:
        servers = {}
        for name in names:
            if name == "convoy":
                service = stack.enter_context(running_service(HOME, model, WORKERS, plan=plan))
                servers[name] = Server(service.port, service.process)
            else:
                servers[name] = stack.enter_context(serving(OTHERS[name], model, plan))
        yield servers


@contextmanager
def serving(command: Command, model: str, plan: str) -> Iterator[Server]:
    """A server of the application, with the same environment as from ``python -m service``."""
    with tempfile.TemporaryDirectory(prefix="convoy-run-") as folder:
        (Path(folder) / METRICS).mkdir()
        port = free_port()
        environment = {
            **os.environ,
            "CONVOY_HOME": str(HOME),
            "CONVOY_PORT": str(port),
            "CONVOY_MODEL": model,
            "CONVOY_WORKERS": str(WORKERS),
            "CONVOY_PLAN": plan,
            "CONVOY_LOG_LEVEL": "WARNING",
            RUN_FOLDER: folder,
            "PROMETHEUS_MULTIPROC_DIR": str(Path(folder) / METRICS),
            "OMP_NUM_THREADS": str(Settings(workers=WORKERS).forward_threads),
        }
        with started(command(port), environment, port) as server:
            yield server


@contextmanager
def started(command: list[str], environment: dict[str, str], port: int) -> Iterator[Server]:
    """``python -m command`` as a server that is ready on ``port``; ended with the context."""
    with tempfile.TemporaryFile() as log:
        process = psutil.Popen(
            [sys.executable, "-m", *command],
            env=environment,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            server, deadline = Server(port, process), time.monotonic() + START_TIMEOUT_S
            while not _is_ready(server):
                if time.monotonic() > deadline or process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"{command[0]} did not start:\n{log.read().decode()[-3000:]}")
                time.sleep(0.1)
            yield server
        finally:
            process.terminate()
            process.wait(60)


def _is_ready(server: Server) -> bool:
    """Whether a worker answers that the model is loaded."""
    connection = server.connect()
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
