"""Starts services on loopback for the scenarios, and an nginx in front of them."""

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import RunningService, free_port, running_service
from benchmarks.two_versions import prepare_two
from registry.core.paths import Paths
from training.data.sources import load_dataset

MODEL = "models:/digits@champion"

NGINX = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_processes 1;
events {{ worker_connections 2048; }}
http {{
    map $upstream_addr $again {{ default 0; "~," 1; }}
    log_format again "$upstream_addr";
    access_log {folder}/again.log again if=$again;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 64m;
    upstream convoy {{
        {servers}
        keepalive 32;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://convoy;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_connect_timeout 1s;
            proxy_next_upstream error timeout http_503 non_idempotent;
            proxy_next_upstream_tries 4;
        }}
    }}
}}
"""


@contextmanager
def paths_of_two() -> Iterator[tuple[Paths, bytes]]:
    """A home with two small published versions of a model, and a picture for it."""
    with tempfile.TemporaryDirectory(prefix="convoy-chaos-") as folder:
        paths = Paths(Path(folder))
        prepare_two(paths)
        yield paths, load_dataset("digits", paths.datasets).test.encode(0)


def service(
    paths: Paths, workers: int = 2, pull: bool = False, **more: str
) -> AbstractContextManager[RunningService]:
    return running_service(paths.root, MODEL, workers, pull, **more)


@contextmanager
def nginx(ports: list[int]) -> Iterator[tuple[int, Path]]:
    """Start an nginx for the services on ``ports``, which tries another one if one fails.

    Gives its port, and a log file with a line for each request that it repeated.
    """
    if shutil.which("nginx") is None:
        raise SystemExit("this scenario needs nginx; install it: apt install nginx-light")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="convoy-nginx-") as folder:
        # nginx may repeat classifications, because they change nothing. With max_fails=0, it never
        # stops trying a service.
        servers = " ".join(f"server 127.0.0.1:{each} max_fails=0;" for each in ports)
        conf = Path(folder) / "nginx.conf"
        conf.write_text(NGINX.format(folder=folder, port=port, servers=servers))
        process = subprocess.Popen(
            ["nginx", "-c", str(conf), "-p", folder, "-e", f"{folder}/error.log"]
        )
        try:
            wait_for_port(port)
            yield port, Path(folder) / "again.log"
        finally:
            process.terminate()
            process.wait(10)


class BehindNginx(NamedTuple):
    """nginx's port, a picture, two services of one worker, and the log of repeated requests."""

    port: int
    image: bytes
    services: tuple[RunningService, RunningService]
    again: Path

    def asked_again(self) -> int:
        """The number of requests that nginx sent to a service more than once."""
        return len(self.again.read_text().splitlines())


@contextmanager
def two_behind_nginx() -> Iterator[BehindNginx]:
    with (
        paths_of_two() as (paths, image),
        service(paths, workers=1) as one,
        service(paths, workers=1) as two,
        nginx([one.port, two.port]) as (port, again),
    ):
        yield BehindNginx(port, image, (one, two), again)


def wait_for_port(port: int, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"no process listened on port {port} within {timeout_s:g} s")
