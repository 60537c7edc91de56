"""What the worker and the application say to each other, beside WSGI."""

import socket
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from msgspec import Struct

IN_LOOP = "convoy.in_loop"
"""In the environment of a request that the loop answers, the size of its body in bytes.

It must not take long.
"""

WAITING = "convoy.waiting"
"""In the environment of a request that the loop answers: how many were postponed and wait."""

ENDING = "convoy.ending"
"""In the environment of every request from the moment at which the worker was told to end."""


class Postpone(Exception):
    """Raised by an application whose work is too long for the loop; a thread calls it again."""

    def __init__(self, background: bool = False, queues: bool = False) -> None:
        """``background``: the work is not what this server is for, and may take its time.

        ``queues``: later requests wait for this one, so that another worker should have them.
        """
        super().__init__()
        self.background = background
        self.queues = queues


class Limits(Struct, frozen=True):
    """How much one client may send, and how long it may take.

    Attributes:
        max_body_bytes: of a longer body nothing is read; the application refuses it by its length.
        max_json_bytes: the same for a body of JSON, which is parsed in one piece.
        head_s: grace before ``MIN_BYTES_PER_S`` counts, and how long a client may pause.
        keep_alive_s: without a byte between two requests.
        proxies: networks of trusted proxies, whose connections are many clients'.
        age_s: the answer after that is the last on its connection. Who keeps one for ever would
            stay with the worker that took it, whatever others have come since.
    """

    max_body_bytes: int = 64 * 1024 * 1024
    max_json_bytes: int = 4 * 1024 * 1024
    head_s: float = 10.0
    keep_alive_s: float = 75.0
    age_s: float = 60.0
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = ()


class ServerOptions(Struct, frozen=True, kw_only=True):
    """What a worker is told before it starts, by gunicorn's hook ``post_fork``.

    Attributes:
        address: host and port of the worker's own listening socket.
        family: ``AF_INET`` or ``AF_INET6``.
        limits: of each connection.
        describe_error: the body, problem JSON, of an error that the worker answers itself: from
            the status, the title, the detail and the id of the request.
        unready_s: how long probes say no before the worker stops listening.
        max_connections_per_address: None for three quarters of a worker's.
        handover_folder: where the workers of a service find each other; None for no handover.
    """

    address: tuple[str, int]
    family: socket.AddressFamily
    limits: Limits
    describe_error: Callable[[int, str, str, str], bytes]
    shutdown_delay_s: float = 0.0
    max_connections_per_address: int | None = None
    handover_folder: Path | None = None
