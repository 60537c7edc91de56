"""Runs the control plane: one gunicorn process with threads, on a port of its own.

Where pullers may only read the registry, trials are guarded from here. A thread samples the live
figures, so that a page has its charts when it opens.
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
SILENT_S = 10
# A promotion that times forward passes for the first time takes a minute or two.
TIMEOUT_S = 900


def serve(host: str, port: int, guard: bool = False) -> int:
    """Serve until SIGTERM or Ctrl-C; ``guard`` trials, too."""
    if not Tokens(convoy_paths().tokens).all():
        log.warning("nobody has a token yet; run: python -m registry token add NAME --role admin")
    ControlPlane(host, port, guard).run()
    return 0


class PatientWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """gthread, but a client that falls silent in a request does not hold a thread for long."""

    def handle(self, conn: Any) -> Any:
        # Of the kernel's: gunicorn takes a time-out of Python's away again.
        limit = struct.pack("ll", SILENT_S, 0)
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        return super().handle(conn)


class ControlPlane(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn, told by us instead of by a command line."""

    def __init__(self, host: str, port: int, guard: bool) -> None:
        self._guard = guard
        self._bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        super().__init__()

    def load_config(self) -> None:
        for name, value in {
            "bind": self._bind,
            "worker_class": "registry.control.server.PatientWorker",
            "workers": 1,
            "threads": THREADS,
            "timeout": TIMEOUT_S,
            "control_socket_disable": True,
            "limit_request_line": 2000,
            # Loopback might rewrite a request's path, and a proxy may pass a client's header on.
            "forwarder_headers": "",
        }.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
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
