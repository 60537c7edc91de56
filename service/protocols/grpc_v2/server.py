"""``GrpcServer``: one worker's gRPC server on a port that all workers share."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import grpc

from service.protocols.grpc_v2.call_threads import CallThreads, Turns
from service.protocols.grpc_v2.drain import drain
from service.protocols.grpc_v2.receiving import Receiver
from service.protocols.grpc_v2.service import InferenceService
from service.server.protocol import connections_of_each
from service.settings import Settings
from service.state import State

log = logging.getLogger(__name__)
# It logs a traceback for each value of metadata that is not ASCII, before any check of the client.
logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)

# More calls at a time would only compete for the interpreter.
AT_WORK = 4
# Calls that have arrived and are not answered; grpcio refuses further ones with RESOURCE_EXHAUSTED.
MAX_CALLS = 1024
# Calls whose clients send their message slowly.
MAX_SLOW = 192
# All messages that have arrived and are not answered.
MAX_RECEIVED_BYTES = 256 * 1024 * 1024
# By how much a worker may grow while messages arrive slowly: as much as the bodies of HTTP requests
# may take (``MAX_RECEIVED_BYTES`` of the loop), and as much again.
MAX_GROWTH_BYTES = 512 * 1024 * 1024
# Calls on one client's connection.
MAX_STREAMS = 64
MAX_CONNECTIONS = 1000
# A worker that ends waits for its connections to reach their age, within the graceful time-out.
AGE_SHARE = 0.4


class GrpcServer:
    """Answers the Open Inference Protocol and gRPC's health checks until ``end``."""

    def __init__(self, state: State) -> None:
        """Prepare the server; it listens after ``start``."""
        self._settings = state.settings
        threads = CallThreads(AT_WORK)
        receiver = Receiver(threads, MAX_SLOW, MAX_RECEIVED_BYTES, MAX_GROWTH_BYTES)
        self._service = InferenceService(state, receiver, Turns(AT_WORK))
        self._server = grpc.server(
            # grpcio only calls ``submit``.
            cast("ThreadPoolExecutor", threads),
            handlers=self._service.handlers(),
            options=_options(state.settings),
            maximum_concurrent_rpcs=MAX_CALLS,
        )

    def start(self) -> None:
        """Listen on the port that all workers share.

        Raises:
            OSError: the port cannot be used.
        """
        host, number = self._settings.host, self._settings.grpc_port
        place = f"[{host}]:{number}" if ":" in host else f"{host}:{number}"
        credentials = _credentials(self._settings)
        try:
            if credentials:
                self._server.add_secure_port(place, credentials)
            else:
                self._server.add_insecure_port(place)
        except RuntimeError as error:
            raise OSError(f"{place} cannot be used for gRPC: {error}") from error
        self._server.start()
        log.info("listening on %s port %d for gRPC", host, number)

    def end(self, delay_s: float, grace_s: float) -> None:
        """Say that the server is not ready, and end after ``delay_s``; returns at once.

        ``grace_s`` is how long the calls have to end after that.
        """
        self._service.ending = True
        self._end = threading.Thread(
            target=self._stop, args=(delay_s, grace_s), name="grpc-end", daemon=True
        )
        self._end.start()

    def join(self, timeout_s: float) -> bool:
        """Wait until the server has ended, at most ``timeout_s``; call ``end`` before."""
        self._end.join(timeout_s)
        return not self._end.is_alive()

    def _stop(self, delay_s: float, grace_s: float) -> None:
        began = time.monotonic()
        time.sleep(delay_s)
        assert self._settings.grpc_port is not None
        drain(self._settings.grpc_port, grace_s)
        left_s = began + delay_s + grace_s - time.monotonic()
        self._server.stop(max(0.0, left_s)).wait()


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """The certificate and key of the settings; None without them.

    Raises:
        OSError: a file cannot be read.
    """
    if settings.grpc_certificate is None or settings.grpc_key is None:
        return None
    pair = settings.grpc_key.read_bytes(), settings.grpc_certificate.read_bytes()
    return grpc.ssl_server_credentials([pair])


def _options(settings: Settings) -> list[tuple[str, int]]:
    age_s = min(settings.max_connection_age_s, AGE_SHARE * settings.graceful_timeout_s)
    return [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", settings.max_body_bytes),
        # Only "identity": a compressed message grows before anything counts it.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        (
            "grpc.max_allowed_incoming_connections",
            min(MAX_CONNECTIONS, connections_of_each(servers=2)),
        ),
        # Clients connect again after this time, and so find workers that have started since. It
        # also ends clients that send a message slowly.
        ("grpc.max_connection_age_ms", int(1000 * age_s)),
        ("grpc.max_connection_age_grace_ms", int(1000 * settings.deadline_s)),
        # A client that has vanished is noticed within two minutes.
        ("grpc.keepalive_time_ms", 90_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
