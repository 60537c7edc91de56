"""The gunicorn worker: it listens, runs the request loop, and ends without losing a request.

The loop reads each request completely before it calls the application, and sends answers as fast as
clients take them, so a slow client occupies no thread (``service.server.request_loop``).

It knows nothing about images. It builds on gunicorn 26's arbiter, parser and response. It writes no
access log, and ignores ``max_requests``, ``pre_request`` and ``post_request``.
"""

import math
import os
import socket
import sys
import time
from types import FrameType
from typing import Any

from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker
from msgspec.structs import replace

from service.server.protocol import Companion, ServerOptions, connections_of_each
from service.server.request_loop import POLL_INTERVAL_S, RequestLoop
from service.server.request_pools import RequestPools
from service.server.sockets.client_sockets import ClientSockets
from service.server.sockets.graceful_close import RECONCILE_TIMEOUT_S, reject_new_connections
from service.server.sockets.handover import NEVER, Handover

# A draining worker closes idle connections after this time. If a client sends a request before
# that, the answer has "Connection: close".
IDLE_S = 1.0
# The drain ends this long before the graceful time-out. The hook ``worker_exit`` has the rest.
RESERVE_S = 1.0
# One address may have this share of a worker's connections. A trusted proxy may have all of them.
ADDRESS_SHARE = 0.75


class LoopWorker(Worker):  # type: ignore[misc]  # gunicorn has no types
    """The module's docstring describes it."""

    options: ServerOptions
    killed_at: float = math.inf
    """When the arbiter kills a worker that drains, by ``time.monotonic``."""
    alive: bool
    sockets: list[Any]

    def init_process(self) -> None:
        """Make what answers requests, then load the application and call ``run``."""
        self._pools = RequestPools(self.cfg.threads)
        self._clients = self._client_sockets()
        folder = self.options.handover_folder
        self._handover = Handover(folder) if folder else None
        self._loop = RequestLoop(self, self._clients, self._pools, self._handover)
        super().init_process()

    def run(self) -> None:
        """Answer requests until SIGTERM or until the arbiter has died, then drain."""
        clients, done = self._clients, self._pools.done
        clients.call_on_input(done.fileno(), done.run_callbacks)
        # Listen only after loading: a client accepted earlier would wait for the load.
        own = [] if self.sockets else [self._listen()]
        self.sockets = self.sockets or own
        for listener in self.sockets:
            listener.setblocking(False)
            clients.call_on_input(listener, clients.accept)
        if self._handover:
            clients.call_on_input(self._handover.sock, self._take_over)
            self._handover.load = 0
        companion = self.options.companion
        self._companion = companion(self.wsgi) if companion else None
        if self._companion:
            self._start(self._companion)
        while self.alive and os.getppid() == self.ppid:
            self._loop.turn()
        self._drain(own)
        self._pools.stop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM: answer the accepted requests, then end."""
        if self.alive:
            self.alive = False
            self._pools.done.defer(lambda: None)  # wakes the loop

    def _client_sockets(self) -> ClientSockets:
        servers = 2 if self.options.companion else 1
        maximum = min(self.cfg.worker_connections, connections_of_each(servers))
        share = self.options.max_connections_per_address or max(1, int(ADDRESS_SHARE * maximum))
        limits = replace(self.options.limits, keep_alive_s=self.cfg.keepalive)
        return ClientSockets(limits, maximum, share, self.log)

    def _listen(self) -> socket.socket:
        (host, port), family = self.options.address, self.options.family
        try:
            listener = socket.create_server(
                (host, port),
                family=family,
                backlog=self.cfg.backlog,
                reuse_port=True,
                dualstack_ipv6=family == socket.AF_INET6,
            )
        except OSError as error:
            self.log.error("cannot listen on %s port %d: %s", host, port, error)
            # Ends the arbiter too, because another worker would fail in the same way.
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
        self.log.info("listening on %s port %d", host, port)
        return listener

    def _start(self, companion: Companion) -> None:
        try:
            companion.start()
        except OSError as error:
            self.log.error("cannot listen: %s", error)
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    def _take_over(self, sock: socket.socket) -> None:
        """Take the connections that other workers have passed on."""
        assert self._handover is not None
        while taken := self._handover.take():
            self._clients.adopt(taken)

    def _drain(self, own: list[socket.socket]) -> None:
        """End without losing a request; ``own`` are listeners of this worker alone.

        First only /readyz fails, while the worker still serves, so that proxies choose another
        worker. Then it accepts no new connections, and every answer has "Connection: close".
        """
        now = time.monotonic()
        self.killed_at = now + self.cfg.graceful_timeout
        ends = self.killed_at - RESERVE_S
        self._loop.ending = True
        if self._companion:
            delay_s = self.options.shutdown_delay_s
            self._companion.end(delay_s, ends - now - delay_s)
        self._turn_until(now + self.options.shutdown_delay_s)
        if self._handover:
            self._handover.load = NEVER
        for listener in own:  # other workers share the arbiter's
            reject_new_connections(listener)
        # Accept clients whose handshake was under way.
        self._turn_until(time.monotonic() + RECONCILE_TIMEOUT_S, RECONCILE_TIMEOUT_S)
        for listener in self.sockets:
            self._clients.ignore(listener)
            while self._clients.accept(listener):
                pass
            listener.close()
        if self._handover:
            self._clients.ignore(self._handover.sock)
            self._take_over(self._handover.sock)
            self._handover.close()
            self._loop.handover = None
        self._loop.last_answers = True
        idle_until = time.monotonic() + IDLE_S
        while self._clients.connections and (now := time.monotonic()) < ends:
            self._loop.turn()
            if now > idle_until:
                self._clients.close_idle()
        while self._companion and time.monotonic() < ends:
            if self._companion.join(POLL_INTERVAL_S):
                break
            self.notify()

    def _turn_until(self, end: float, wait_s: float = POLL_INTERVAL_S) -> None:
        while time.monotonic() < end:
            self._loop.turn(wait_s)
