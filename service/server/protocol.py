"""What the worker and the application exchange in addition to WSGI."""

import resource
import socket
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct

IN_LOOP = "convoy.in_loop"
"""In a request's environment while the loop calls the application: the body's size in bytes.

The application must answer quickly, or raise ``Postpone``.
"""

WAITING = "convoy.waiting"
"""In the same environment: how many postponed requests wait for a thread or have one."""

ENDING = "convoy.ending"
"""In the environment of every request after the worker received SIGTERM."""


class Postpone(Exception):
    """Raised by the application if it is too slow for the loop; a thread then calls it again."""

    def __init__(self, background: bool = False, queues: bool = False) -> None:
        """Say how to treat the postponed request.

        Args:
            background: the work has low priority, as pages and metrics have.
            queues: later requests will wait for this one, so another worker should take them.
        """
        super().__init__()
        self.background = background
        self.queues = queues


class Limits(Struct, frozen=True):
    """How much one client may send, and how long it may take.

    Attributes:
        max_body_bytes: the worker does not read a longer body; the application refuses it by its
            Content-Length.
        max_json_bytes: the same for a JSON body, which is parsed in one piece.
        head_s: grace before ``MIN_BYTES_PER_S`` counts, and how long a client may pause.
        keep_alive_s: how long a client may stay silent between two requests.
        age_s: after this time, the next answer is the last on its connection. Without that limit a
            client could stay with one worker for ever, even when new workers have started since.
        trusted_proxies: their networks. A proxy's connections carry requests of many clients.
    """

    max_body_bytes: int = 64 * 1024 * 1024
    max_json_bytes: int = 4 * 1024 * 1024
    head_s: float = 10.0
    keep_alive_s: float = 75.0
    age_s: float = 60.0
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = ()


def connections_of_each(servers: int) -> int:
    """How many connections each of the ``servers`` in this process may have, 16 or more.

    The limit of open files permits so many; the process keeps 128 for everything else.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, (soft - 128) // servers)


class Companion(Protocol):
    """Another server in the worker's process, with its own threads."""

    def start(self) -> None:
        """Listen; called once the worker has loaded the application.

        Raises:
            OSError: the port cannot be used.
        """

    def end(self, delay_s: float, grace_s: float) -> None:
        """Begin to end, and return at once.

        Args:
            delay_s: how long the server still accepts calls, while it says that it is not ready.
            grace_s: how long the calls then have to end.
        """

    def join(self, timeout_s: float) -> bool:
        """Wait until the server has ended, at most ``timeout_s``; returns whether it has."""


class ServerOptions(Struct, frozen=True, kw_only=True):
    """The options of a worker, which gunicorn's hook ``post_fork`` sets before it starts.

    Attributes:
        address: host and port of the worker's own listening socket.
        family: ``AF_INET`` or ``AF_INET6``.
        limits: of each connection.
        describe_error: makes the problem JSON for an error that the worker answers itself, from
            the status, the title, the detail and the id of the request.
        on_refusal: called when the worker has answered a request itself, with the application,
            the client's address, the status, the bytes of the body, and the id of the request.
        shutdown_delay_s: how long an ending worker still accepts connections while /readyz fails.
        max_connections_per_address: None for three quarters of the worker's connections.
        handover_folder: where the workers of a service find each other; None for no handover.
        companion: makes another server that answers with the same loaded application.
    """

    address: tuple[str, int]
    family: socket.AddressFamily
    limits: Limits
    describe_error: Callable[[int, str, str, str], bytes]
    on_refusal: Callable[[Any, str, int, int, str], None] | None = None
    shutdown_delay_s: float = 0.0
    max_connections_per_address: int | None = None
    handover_folder: Path | None = None
    companion: Callable[[Any], Companion] | None = None
