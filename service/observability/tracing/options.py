"""``TracingOptions``: what the ``OTEL_…`` variables ask for.

Sources: "Environment Variable Specification" and "OpenTelemetry Protocol Exporter" of OpenTelemetry
1.45. The SDK itself reads the variables of the exporter and of the resource.
"""

import importlib.util
from collections.abc import Mapping

from msgspec import Struct

from registry.core.errors import UsageError

PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
PROTOCOL = "http/protobuf"
DEFAULT_SAMPLER = "parentbased_always_on"
# Sampler → the share of new traces that it samples (None: OTEL_TRACES_SAMPLER_ARG has it), and
# whether it follows the decision of a caller that sent one.
SAMPLERS: dict[str, tuple[float | None, bool]] = {
    "always_on": (1.0, False),
    "always_off": (0.0, False),
    "traceidratio": (None, False),
    "parentbased_always_on": (1.0, True),
    "parentbased_always_off": (0.0, True),
    "parentbased_traceidratio": (None, True),
}


class TracingOptions(Struct, frozen=True, kw_only=True):
    """How a service traces.

    Attributes:
        endpoint: the URL to which spans are sent.
        share: the share of traces to sample among those that this service decides on, 0 to 1.
        follows_caller: whether a caller's decision to sample counts, if it sent one.
        continues_trace: whether a request with ``traceparent`` belongs to its caller's trace.
        max_queue: the most spans that wait to be sent.
        max_batch: the most spans in one message to the collector.
    """

    endpoint: str
    share: float = 1.0
    follows_caller: bool = True
    continues_trace: bool = True
    max_queue: int = 2048
    max_batch: int = 512

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "TracingOptions | None":
        """The options in ``environment``; None if it does not ask for traces.

        Raises:
            UsageError: a variable has a value that this service cannot use, or a package is
                missing. The text names it.
        """
        endpoint = _endpoint(environment)
        if endpoint is None or environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return None
        exporters = _list(environment, "OTEL_TRACES_EXPORTER", "otlp")
        if exporters == ["none"]:
            return None
        if exporters != ["otlp"]:
            raise UsageError(f"OTEL_TRACES_EXPORTER={','.join(exporters)!r}: use otlp or none")
        _check_protocol(environment)
        _check_packages()
        share, follows_caller = _sampler(environment)
        options = cls(
            endpoint=endpoint,
            share=share,
            follows_caller=follows_caller,
            continues_trace="tracecontext"
            in _list(environment, "OTEL_PROPAGATORS", "tracecontext,baggage"),
            max_queue=_count(environment, "OTEL_BSP_MAX_QUEUE_SIZE", 2048),
            max_batch=_count(environment, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512),
        )
        if options.max_batch > options.max_queue:
            raise UsageError(
                f"OTEL_BSP_MAX_EXPORT_BATCH_SIZE={options.max_batch} is more than "
                f"OTEL_BSP_MAX_QUEUE_SIZE={options.max_queue}"
            )
        return options


def _endpoint(environment: Mapping[str, str]) -> str | None:
    """The URL for spans: that for traces unchanged, or that for all signals with a path added."""
    name = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    url = environment.get(name, "").strip()
    if not url:
        name = "OTEL_EXPORTER_OTLP_ENDPOINT"
        if not (url := environment.get(name, "").strip()):
            return None
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{name}={url!r}: write http://HOST:PORT or https://HOST:PORT")
    return url if "TRACES" in name else f"{url.rstrip('/')}/v1/traces"


def _check_protocol(environment: Mapping[str, str]) -> None:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if protocol := environment.get(name, "").strip():
            if protocol != PROTOCOL:
                raise UsageError(
                    f"{name}={protocol!r}: use {PROTOCOL}, on the collector's port 4318"
                )
            return


def _check_packages() -> None:
    for package in PACKAGES:
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # a parent package is missing
            found = None
        if found is None:
            raise UsageError(
                f"OTEL_EXPORTER_OTLP_ENDPOINT is set, but the package {package} is not installed; "
                "run pip install 'convoy[tracing]', or set OTEL_SDK_DISABLED=true"
            )


def _sampler(environment: Mapping[str, str]) -> tuple[float, bool]:
    """The share of new traces to sample, and whether the caller's decision counts."""
    name = environment.get("OTEL_TRACES_SAMPLER", "").strip() or DEFAULT_SAMPLER
    if name not in SAMPLERS:
        raise UsageError(f"OTEL_TRACES_SAMPLER={name!r}: use one of {', '.join(SAMPLERS)}")
    share, follows_caller = SAMPLERS[name]
    if share is None:
        text = environment.get("OTEL_TRACES_SAMPLER_ARG", "").strip() or "1"
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise UsageError(f"OTEL_TRACES_SAMPLER_ARG={text!r}: use a number from 0 to 1")
    return share, follows_caller


def _count(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip()
    if text and not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"{name}={text!r}: use a whole number from 1")
    return int(text) if text else default


def _list(environment: Mapping[str, str], name: str, default: str) -> list[str]:
    text = environment.get(name, "").strip() or default
    return [part.strip() for part in text.split(",")]
