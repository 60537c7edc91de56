"""An application that answers every request at once, and gunicorn's configuration for it.

``worker_ends`` runs it under our worker. A worker ends and another starts in a fraction of a
second, so that the benchmark can observe hundreds of ends.
"""

import os
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from service.server.protocol import Limits, ServerOptions

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

PORT = "BENCH_PORT"

wsgi_app = f"{__name__}:app"
bind: list[str] = []
workers = 2
keepalive = 75
control_socket_disable = True
loglevel = "error"


def post_fork(server: Any, worker: Any) -> None:
    worker.options = ServerOptions(
        address=("127.0.0.1", int(os.environ[PORT])),
        family=socket.AF_INET,
        limits=Limits(),
        describe_error=lambda status, title, detail, request_id: title.encode(),
    )


def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
