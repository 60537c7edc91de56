"""Runs the control plane: one gunicorn process with threads, on its own port.

With ``--guard`` it also guards canaries, for pullers that have only read access to the registry.
"""

import logging
import socket
import struct
from threading import Event, Thread
from typing import Any

from gunicorn.app.base import BaseApplication
from gunicorn.workers.gthread import ThreadWorker

from registry.auth.tokens import Tokens
from registry.canary.monitor import CanaryMonitor
from registry.canary.serving_client import service_addresses
from registry.core.paths import convoy_paths

log = logging.getLogger(__name__)

THREADS = 16
RECEIVE_TIMEOUT_S = 10
# A promotion takes a minute or two if the gate has yet to time the versions' forward passes.
TIMEOUT_S = 900


def serve(host: str, port: int, guard: bool = False) -> int:
    """Serve until SIGTERM or Ctrl-C; with ``guard``, also guard canaries."""
    if not Tokens(convoy_paths().tokens).all():
        log.warning("there are no tokens yet; run: convoy token add NAME --role admin")
    ControlPlane(host, port, guard).run()
    return 0


class PatientWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """gthread; a client that sends nothing for 10 s within a request frees its thread."""

    def handle(self, conn: Any) -> Any:
        """Let gunicorn handle ``conn``, where no read waits longer than ``RECEIVE_TIMEOUT_S``."""
        # The kernel's time-out, because gunicorn resets the one that Python sets on the socket.
        limit = struct.pack("ll", RECEIVE_TIMEOUT_S, 0)
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        return super().handle(conn)


class ControlPlane(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn, configured by this module instead of a command line."""

    def __init__(self, host: str, port: int, guard: bool) -> None:
        self._guard = guard
        self._bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        super().__init__()

    def load_config(self) -> None:
        """Set gunicorn's settings: one worker with ``THREADS`` threads, and its time-out."""
        for name, value in {
            "bind": self._bind,
            "worker_class": "registry.control.server.PatientWorker",
            "workers": 1,
            "threads": THREADS,
            "timeout": TIMEOUT_S,
            "control_socket_disable": True,
            "limit_request_line": 2000,
            # By default gunicorn lets a client on loopback rewrite a request's path by headers. A
            # proxy on loopback may forward such headers from its own clients.
            "forwarder_headers": "",
        }.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """The WSGI application; gunicorn calls this once, in its worker.

        Starts a thread that samples the traffic and, with ``guard``, one that guards canaries.
        """
        from registry.control.app import create_app
        from registry.store.mlflow_store import ModelStore

        paths, services = convoy_paths(), service_addresses()
        if self._guard:
            watch = CanaryMonitor(paths, services, "control plane").watch
            arguments = (lambda: ModelStore(paths), Event())
            Thread(target=watch, args=arguments, name="guard", daemon=True).start()
        store = ModelStore(paths)
        app = create_app(store, paths, services)
        history = app.extensions["convoy"].history
        watched = (store.models, Event())
        Thread(target=history.watch, args=watched, name="history", daemon=True).start()
        return app
