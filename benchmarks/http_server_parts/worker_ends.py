"""What clients see when workers end under load, with the kernel's filter and without it.

A worker that ends closes its listening socket. A client whose handshake the kernel completed after
the last ``accept`` is reset then, though it did nothing wrong and another worker listens. So
``service.server.graceful_close`` has the kernel drop the first packet of new connections (SYN)
before; the client's kernel sends it again after a second, and it reaches another worker.

Two workers answer with nothing to do (``bare``); clients connect, ask once, and connect anew. One
worker after the other is told to end, never both. ``lost`` counts clients that were connected and
never answered, ``refused`` those that the kernel turned away though another worker listened,
``late`` those whose connection took over half a second: the price of the filter.
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
# Clients that the filter held up are back before the next end, so that as many meet each of them.
PAUSE_S = 1.2
REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
# A close by which neither side keeps the port for a minute.
RESET = struct.pack("ii", 1, 0)


def count_losses(worker_class: str, ends: int) -> dict[str, int]:
    """What became of the clients of ``worker_class`` while so many of its workers ended."""
    port = free_port()
    environment = {**os.environ, bare.PORT: str(port)}
    command = ["gunicorn", "-c", f"python:{bare.__name__}", "--worker-class", worker_class]
    context = get_context("fork")  # imports nothing anew
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
    """Have the oldest worker end, and wait until another listens in its place."""
    workers = listening(server)
    oldest = min(workers, key=psutil.Process.create_time)
    oldest.send_signal(signal.SIGTERM)
    listening(server, without=oldest)


def listening(server: Server, without: psutil.Process | None = None) -> list[psutil.Process]:
    """The two workers, once both listen."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        workers = [each for each in server.process.children() if each != without]
        if len(workers) == 2 and all(map(_listens, workers)):
            return workers
        time.sleep(0.01)
    raise SystemExit(f"two workers do not listen within {TIMEOUT_S:g} s")


def _listens(worker: psutil.Process) -> bool:
    try:
        return any(each.status == psutil.CONN_LISTEN for each in worker.net_connections())
    except psutil.NoSuchProcess:
        return False


def ask_again(port: int, all_ask: Barrier, over: Event) -> dict[str, int]:
    """One client, until it is over; how often each outcome came."""
    outcomes: Counter[str] = Counter(ask(port))
    all_ask.wait(TIMEOUT_S)
    while not over.is_set():
        for _ in range(50):  # ``over`` is asked of another process, which takes long
            outcomes.update(ask(port))
    return dict(outcomes)


def ask(port: int) -> list[str]:
    """Connect and ask once; the outcome, and whether it came late."""
    began = time.monotonic()
    with socket.socket() as client:
        client.settimeout(TIMEOUT_S)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        try:
            client.connect(("127.0.0.1", port))
        except (ConnectionRefusedError, ConnectionResetError):
            return ["refused"]
        late = ["late"] if time.monotonic() - began > LATE_S else []
        try:
            client.sendall(REQUEST)
            answered = client.recv(4096).startswith(b"HTTP/1.1 200 ")
        except OSError:
            answered = False
    return ["answered" if answered else "lost", *late]
