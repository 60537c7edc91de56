"""``GrpcServer``: one worker's gRPC server on a port that all workers share."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2

from service.protocols.grpc_v2.calls import SERVICE
from service.protocols.grpc_v2.drain import drain
from service.protocols.grpc_v2.service import InferenceService
from service.protocols.grpc_v2.turns import Turns
from service.settings import Settings
from service.state import State

log = logging.getLogger(__name__)

# More calls at a time would only compete for the interpreter.
AT_WORK = 4
# Calls that have arrived and are not answered; grpcio refuses further ones with RESOURCE_EXHAUSTED.
MAX_CALLS = 256
# Calls on one client's connection.
MAX_STREAMS = 64
MAX_CONNECTIONS = 1000
# A worker that ends waits for its connections to reach their age, within the graceful time-out.
AGE_SHARE = 0.4
# A message is an image or a tensor of at most this size, and a few kilobytes.
HEAD_BYTES = 64 * 1024


class GrpcServer:
    """Answers the Open Inference Protocol and gRPC's health checks until ``end``."""

    def __init__(self, state: State) -> None:
        """Prepare the server; it listens after ``start``."""
        self._settings = state.settings
        self._service = InferenceService(state, Turns(AT_WORK))
        self._server = grpc.server(
            # grpcio waits in such a thread until the message of a call has arrived. With fewer
            # threads, a few clients that send slowly would keep out all others and the probes.
            ThreadPoolExecutor(MAX_CALLS, "grpc"),
            handlers=[self._service.handlers(), health_handlers(lambda: self._service.is_ready)],
            options=_options(state.settings),
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        self._ended = threading.Event()

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

        def stop() -> None:
            began = time.monotonic()
            time.sleep(delay_s)
            assert self._settings.grpc_port is not None
            drain(self._settings.grpc_port, grace_s)
            left_s = began + delay_s + grace_s - time.monotonic()
            self._server.stop(max(0.0, left_s)).wait()

        def end() -> None:
            try:
                stop()
            finally:
                self._ended.set()

        threading.Thread(target=end, name="grpc-end", daemon=True).start()

    def join(self) -> None:
        """Wait until the server has ended."""
        self._ended.wait()


def health_handlers(is_ready: Callable[[], bool]) -> grpc.GenericRpcHandler:
    """GRPC's health checking protocol, for the server and the inference service.

    Source: github.com/grpc/grpc, doc/health-checking.md. ``Watch`` is not implemented.
    """

    def check(
        request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in ("", SERVICE):
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details(f"there is no service {request.service[:80]!r}")
        status = "SERVING" if is_ready() else "NOT_SERVING"
        return health_pb2.HealthCheckResponse(status=status)

    handler = grpc.unary_unary_rpc_method_handler(
        check,
        request_deserializer=health_pb2.HealthCheckRequest.FromString,
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handler})


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
        (
            "grpc.max_receive_message_length",
            min(settings.max_body_bytes, settings.max_image_bytes + HEAD_BYTES),
        ),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        # Clients connect again after this time, and so find workers that have started since. It
        # also ends clients that send a message slowly.
        ("grpc.max_connection_age_ms", int(1000 * age_s)),
        ("grpc.max_connection_age_grace_ms", int(1000 * settings.deadline_s)),
        # A client that has vanished is noticed within two minutes.
        ("grpc.keepalive_time_ms", 90_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
