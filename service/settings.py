"""Every setting of the service, parsed once from the environment into one immutable record."""

import os
import re
import socket
import tempfile
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from registry.core.devices import CORES, forward_threads
from registry.core.errors import UsageError
from registry.core.names import unusable
from registry.core.paths import convoy_paths
from registry.core.service_address import SERVICE_KEY, local_address
from registry.model.image.limits import (
    DEFAULT_LIMITS,
    DecodedBytes,
    DecodeLimits,
    FileBytes,
    PixelCount,
)
from registry.model.refs import ModelRef, parse_model_refs
from service.observability.tracing.options import TracingOptions
from service.server.protocol import Limits

Network = IPv4Network | IPv6Network
Count = Annotated[int, Meta(ge=1)]
LOOP_PIXELS = 500_000
MIN_DRAIN_S = 3.0
# A picture that needs more than this to decode is decoded alone: each may take 260 MB.
LARGE_BYTES = 6_000_000
Seconds = Annotated[float, Meta(gt=0, le=3600)]
Route = Annotated[str, Meta(pattern=r"^/[A-Za-z0-9._~:/-]+$", max_length=200)]

_ORIGIN = re.compile(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:]+\])(?::[0-9]{1,5})?")

# Not for operators: ``python -m service`` sets these for the processes that it starts.
GPU_SOCKET = "CONVOY_GPU_SOCKET"
RUN_FOLDER = "CONVOY_RUN_FOLDER"
METRICS, HANDOVER = "metrics", "handover"  # sub-folders of the run folder
# Linux allows 107 bytes for a socket's path. The run folder's and the socket's names need the rest.
MAX_PARENT_BYTES = 60
# Environment variable → field; docs/operations.md has the same table with the reasons.
VARIABLES = {
    "CONVOY_HOST": "host",
    "AIP_HTTP_PORT": "port",  # CONVOY_PORT counts if both are set
    "CONVOY_PORT": "port",
    "AIP_HEALTH_ROUTE": "health_route",
    "AIP_PREDICT_ROUTE": "predict_route",
    "CONVOY_GRPC_PORT": "grpc_port",
    "CONVOY_GRPC_CERTIFICATE": "grpc_certificate",
    "CONVOY_GRPC_KEY": "grpc_key",
    "CONVOY_DEVICE": "device",
    "CONVOY_PLAN": "plan",
    "CONVOY_WORKERS": "workers",
    "CONVOY_THREADS": "threads",
    "CONVOY_MAX_BATCH": "max_batch",
    "CONVOY_MAX_BATCH_COMPUTE_MS": "max_batch_compute_ms",
    "CONVOY_MAX_IMAGE_BYTES": "max_image_bytes",
    "CONVOY_MAX_BODY_BYTES": "max_body_bytes",
    "CONVOY_MAX_JSON_BYTES": "max_json_bytes",
    "CONVOY_MAX_PIXELS": "max_pixels",
    "CONVOY_MAX_DECODED_BYTES": "max_decoded_bytes",
    "CONVOY_QUEUE_LIMIT": "queue_limit",
    "CONVOY_DEADLINE_S": "deadline_s",
    "CONVOY_MAX_QUEUE_DELAY_S": "max_queue_delay_s",
    "CONVOY_GRACEFUL_TIMEOUT_S": "graceful_timeout_s",
    "CONVOY_SHUTDOWN_DELAY_S": "shutdown_delay_s",
    "CONVOY_MAX_CONNECTION_AGE_S": "max_connection_age_s",
    "CONVOY_MAX_CONNECTIONS_PER_ADDRESS": "max_connections_per_address",
    "CONVOY_FORWARD_TIMEOUT_S": "forward_timeout_s",
    "CONVOY_MAX_RSS_MB": "max_rss_mb",
    "CONVOY_KEEP_WARM_S": "keep_warm_s",
    "CONVOY_STICKY_HEADER": "sticky_header",
    "CONVOY_SHADOW_CPU": "shadow_cpu",
    "CONVOY_STALE_S": "stale_s",
    "CONVOY_AUTH": "auth",
    "CONVOY_RATE_LIMIT": "rate_limit",
    "CONVOY_BURST": "burst",
    "CONVOY_TRUSTED_PROXIES": "trusted_proxies",
    "CONVOY_CORS_ORIGINS": "cors_origins",
    "CONVOY_LOG_LEVEL": "log_level",
    "CONVOY_ACCESS_LOG": "access_log",
}


class Settings(Struct, frozen=True, kw_only=True):
    """The settings of a service. Sizes are in bytes, times in seconds.

    It has many fields because each is a setting of docs/operations.md.

    Attributes:
        models: the models to serve; the first is the default model.
        grpc_port: the port of the Open Inference Protocol over gRPC; None for none.
        grpc_certificate: a file with the server's certificates in PEM form, for gRPC with TLS.
        grpc_key: the file with the private key of ``grpc_certificate``.
        health_route: a further path that answers whether the service is ready, for Vertex AI.
        predict_route: a further path that classifies with the default model, for Vertex AI.
        max_batch: the most images in one forward pass, and in one request.
        max_batch_compute_ms: the longest that a forward pass should take.
        keep_warm_s: how long a replaced version stays in memory.
        sticky_header: requests with the same value get the same version during a canary.
        shadow_cpu: the share of the machine's cores that the shadow may use.
        auth: with ``required``, clients need a token from the file ``tokens``.
        service_key: a client that sends it may read metrics and traffic.
        rate_limit: requests a second that one client may send, after the first ``burst``.
        trusted_proxies: networks, separated by commas. On a connection from one of them, the last
            address in X-Forwarded-For is the client's.
        cors_origins: origins, separated by commas, whose pages may send requests.
        access_log: with ``on``, each request has a line in the log.
        tracing: how requests are traced; None if they are not.
        gpu_socket: the socket of the process that owns the GPU.
        run_folder: files that the processes of this service share while they run.
    """

    models: tuple[ModelRef, ...] = parse_model_refs(None)
    models_folder: Path = Path("var/models")
    plans_folder: Path = Path("var/plans")
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    grpc_port: Annotated[int, Meta(ge=1, le=65535)] | None = None
    grpc_certificate: Path | None = None
    grpc_key: Path | None = None
    health_route: Route | None = None
    predict_route: Route | None = None
    device: str = "auto"
    plan: str = "auto"
    workers: Count = CORES
    threads: Count = 8
    max_batch: Count = 32
    max_batch_compute_ms: Annotated[float, Meta(gt=0)] = 50.0
    max_image_bytes: FileBytes = DEFAULT_LIMITS.max_bytes
    max_body_bytes: Count = 64 * 1024 * 1024
    max_json_bytes: Count = 4 * 1024 * 1024
    max_pixels: PixelCount = DEFAULT_LIMITS.max_pixels
    max_decoded_bytes: DecodedBytes = DEFAULT_LIMITS.max_decoded_bytes
    queue_limit: Count = 256
    deadline_s: Seconds = 10.0
    max_queue_delay_s: Seconds | None = None
    graceful_timeout_s: Count = 30
    shutdown_delay_s: Annotated[float, Meta(ge=0)] = 0.0
    max_connection_age_s: Seconds = 60.0
    max_connections_per_address: Count | None = None
    forward_timeout_s: Seconds = 30.0
    max_rss_mb: Count | None = None
    keep_warm_s: Annotated[float, Meta(ge=0)] = 600.0
    sticky_header: Annotated[str, Meta(pattern="^[A-Za-z0-9-]+$")] = "X-Session-Id"
    shadow_cpu: Annotated[float, Meta(gt=0, le=1)] = 0.2
    stale_s: Annotated[float, Meta(gt=0)] = 60.0
    auth: Literal["off", "required"] = "off"
    tokens: Path = Path("var/tokens/tokens.json")
    service_key: str | None = None
    rate_limit: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    burst: Count = 20
    trusted_proxies: str = ""
    cors_origins: str = ""
    log_level: str = "INFO"
    access_log: Literal["off", "on"] = "off"
    tracing: TracingOptions | None = None
    gpu_socket: Path | None = None
    run_folder: Path | None = None

    @property
    def family(self) -> socket.AddressFamily:
        """The address family of ``host``."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @property
    def shadow_socket(self) -> Path | None:
        """Where workers send samples for the shadow; None without a run folder."""
        return self.run_folder / "shadow" if self.run_folder else None

    @property
    def spans_socket(self) -> Path | None:
        """Where workers send records to make spans of; None without a run folder."""
        return self.run_folder / "spans" if self.run_folder else None

    @property
    def session_variable(self) -> str:
        """The name of ``sticky_header`` in a WSGI environment (RFC 3875, 4.1.18)."""
        return "HTTP_" + self.sticky_header.upper().replace("-", "_")

    @property
    def address(self) -> str:
        """The URL at which a process on this machine reaches the service."""
        return local_address(self.host, self.port)

    @property
    def proxy_networks(self) -> tuple[Network, ...]:
        """The networks in ``trusted_proxies``; raises ``UsageError`` if one cannot be parsed."""
        try:
            parts = (part.strip() for part in self.trusted_proxies.split(","))
            return tuple(ip_network(part) for part in parts if part)
        except ValueError as error:
            raise UsageError(f"CONVOY_TRUSTED_PROXIES={self.trusted_proxies!r}: {error}") from error

    @property
    def cors_origin_list(self) -> tuple[str, ...]:
        """The origins in ``cors_origins``; raises ``UsageError`` if one is malformed."""
        found = tuple(part.strip() for part in self.cors_origins.split(",") if part.strip())
        for origin in found:
            if not _ORIGIN.fullmatch(origin):
                raise UsageError(
                    f"CONVOY_CORS_ORIGINS={self.cors_origins!r}: {origin!r} is not an origin; "
                    "write https://HOST or https://HOST:PORT, in lower case, without a path"
                )
        return found

    @property
    def forward_threads(self) -> int:
        """Threads of one forward pass: this process's cores divided by ``workers``, at least 1."""
        return forward_threads(self.workers)

    @property
    def limits(self) -> Limits:
        """The limits of one client's connection."""
        return Limits(
            max_body_bytes=self.max_body_bytes,
            max_json_bytes=self.max_json_bytes,
            age_s=self.max_connection_age_s,
            trusted_proxies=self.proxy_networks,
        )

    @property
    def decode_limits(self) -> DecodeLimits:
        """Limits of any image; beyond ``common_decode_limits``, a worker decodes one at a time."""
        return DecodeLimits(
            max_bytes=self.max_image_bytes,
            max_pixels=self.max_pixels,
            max_decoded_bytes=self.max_decoded_bytes,
        )

    @property
    def common_decode_limits(self) -> DecodeLimits:
        """Limits of images that any number of threads may decode at once."""
        return replace(
            self.decode_limits, max_decoded_bytes=min(self.max_decoded_bytes, LARGE_BYTES)
        )

    @property
    def loop_decode_limits(self) -> DecodeLimits:
        """Limits of images that a worker's loop decodes itself, in a few milliseconds.

        Scans and parts are limited too: with many of them, few pixels can take long to decode.
        """
        return replace(
            self.decode_limits,
            max_pixels=min(self.max_pixels, LOOP_PIXELS),
            max_scans=1,
            max_parts=100,
        )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """The settings in ``environment``; a variable that is not set has its default.

        Raises:
            UsageError: a value is not allowed; the text names the variable.
        """
        values: dict[str, Any] = {
            field: environment[name] for name, field in VARIABLES.items() if environment.get(name)
        }
        values["models"] = parse_model_refs(environment.get("CONVOY_MODEL"))
        paths = convoy_paths(environment)
        values["models_folder"], values["plans_folder"] = paths.models, paths.plans
        values["tokens"], values["service_key"] = paths.tokens, environment.get(SERVICE_KEY) or None
        for name, field in ((GPU_SOCKET, "gpu_socket"), (RUN_FOLDER, "run_folder")):
            if environment.get(name):
                values[field] = Path(environment[name])
        for field in ("grpc_certificate", "grpc_key"):
            if field in values:
                values[field] = Path(values[field])
        values["tracing"] = TracingOptions.from_environment(environment)
        values["log_level"] = values.get("log_level", "INFO").upper()
        if values["log_level"] not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise UsageError(
                f"CONVOY_LOG_LEVEL={values['log_level']!r}: use DEBUG, INFO, WARNING or ERROR"
            )
        try:
            settings = msgspec.convert(values, cls, strict=False)
            # Check these now, rather than when the first worker starts.
            _ = settings.proxy_networks, settings.cors_origin_list
            if settings.shutdown_delay_s > max(0.0, settings.graceful_timeout_s - MIN_DRAIN_S):
                raise UsageError(
                    f"CONVOY_SHUTDOWN_DELAY_S={settings.shutdown_delay_s:g} leaves no time to "
                    f"drain: it must be {MIN_DRAIN_S:g} s below "
                    f"CONVOY_GRACEFUL_TIMEOUT_S={settings.graceful_timeout_s}"
                )
            return settings
        except msgspec.ValidationError as error:
            used = {name: field for name, field in VARIABLES.items() if environment.get(name)}
            raise UsageError(unusable(error, dict(reversed(used.items())), values)) from error


def run_parent() -> str:
    """Where run folders are made: the temporary folder, or /tmp if its path is too long."""
    parent = tempfile.gettempdir()
    return parent if len(os.fsencode(parent)) <= MAX_PARENT_BYTES else "/tmp"  # noqa: S108
