"""What clients see when workers end under load, with the kernel's filter and without it.

A worker that ends closes its listening socket. The kernel then resets each client whose handshake
it completed after the worker's last ``accept``, although another worker listens. So before the
close, ``service.server.sockets.graceful_close`` makes the kernel drop the first packet (SYN) of new
connections. The client's kernel sends it again after a second, and it reaches another worker.

Two workers run an application that does no work (``bare``). Each client connects, sends a request,
and connects again. The benchmark ends one worker after the other, never both. ``lost`` counts
clients that were connected and got no answer. ``refused`` counts clients that the kernel refused
although another worker listened. ``late`` counts connections that took over half a second: the
price of the filter.
"""

import os
import signal
import socket
import struct
import time
from collections import Counter
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier, Event

import psutil

from benchmarks.common import free_port
from benchmarks.http_server_parts import bare
from benchmarks.http_servers.servers import Server, started

CLIENTS = 6
TIMEOUT_S = 20.0
LATE_S = 0.5
# By the next end, clients that the filter delayed have reconnected: each end meets equally many.
PAUSE_S = 1.2
REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
# SO_LINGER with a time of 0: the close resets the connection, so no port stays in TIME_WAIT.
RESET = struct.pack("ii", 1, 0)


def count_losses(worker_class: str, ends: int) -> dict[str, int]:
    """How often clients had each outcome while ``ends`` workers of ``worker_class`` ended."""
    port = free_port()
    environment = {**os.environ, bare.PORT: str(port)}
    command = ["gunicorn", "-c", f"python:{bare.__name__}", "--worker-class", worker_class]
    context = get_context("fork")  # does not import the modules again
    with started(command, environment, port) as server, context.Manager() as manager:
        all_ask, over = manager.Barrier(CLIENTS + 1), manager.Event()
        with context.Pool(CLIENTS) as pool:
            asking = pool.starmap_async(ask_again, [(port, all_ask, over)] * CLIENTS)
            all_ask.wait(TIMEOUT_S)
            try:
                for _ in range(ends):
                    time.sleep(PAUSE_S)
                    end_one(server)
            finally:
                over.set()
            found = sum(map(Counter, asking.get(2 * TIMEOUT_S)), Counter())
    return {"ends": ends, **{kind: found[kind] for kind in ("answered", "lost", "refused", "late")}}


def end_one(server: Server) -> None:
    """End the oldest worker, and wait until another one listens in its place."""
    workers = listening(server)
    oldest = min(workers, key=psutil.Process.create_time)
    oldest.send_signal(signal.SIGTERM)
    listening(server, without=oldest)


def listening(server: Server, without: psutil.Process | None = None) -> list[psutil.Process]:
    """The two workers, as soon as both listen."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        workers = [each for each in server.process.children() if each != without]
        if len(workers) == 2 and all(map(_listens, workers)):
            return workers
        time.sleep(0.01)
    raise SystemExit(f"two workers did not listen within {TIMEOUT_S:g} s")


def _listens(worker: psutil.Process) -> bool:
    try:
        return any(each.status == psutil.CONN_LISTEN for each in worker.net_connections())
    except psutil.NoSuchProcess:
        return False


def ask_again(port: int, all_ask: Barrier, over: Event) -> dict[str, int]:
    """Run one client until ``over`` is set; return how often it had each outcome."""
    outcomes: Counter[str] = Counter(ask(port))
    all_ask.wait(TIMEOUT_S)
    while not over.is_set():
        for _ in range(50):  # ``over`` lives in another process, so reading it is slow
            outcomes.update(ask(port))
    return dict(outcomes)


def ask(port: int) -> list[str]:
    """Connect and send one request; return the outcome, and ``late`` if connecting took long."""
    started_s = time.monotonic()
    with socket.socket() as client:
        client.settimeout(TIMEOUT_S)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        try:
            client.connect(("127.0.0.1", port))
        except (ConnectionRefusedError, ConnectionResetError):
            return ["refused"]
        late = ["late"] if time.monotonic() - started_s > LATE_S else []
        try:
            client.sendall(REQUEST)
            answered = client.recv(4096).startswith(b"HTTP/1.1 200 ")
        except OSError:
            answered = False
    return ["answered" if answered else "lost", *late]
