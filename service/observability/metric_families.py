"""The service's metrics as Prometheus has them: names, texts, labels and buckets.

The label values are a closed set, so no client can add a time series.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PROTOCOLS = ("v1", "v2", "grpc", "mlflow", "torchserve")
OUTCOMES = ("ok", "client_error", "overload", "unavailable", "server_error")
_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_BUCKETS_PROBABILITY = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class Families:
    """The metrics. It has many attributes because each metric is one of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        version = ("model_name", "model_version")
        self.requests = Counter(
            "convoy_requests",
            f"Classification requests by protocol ({', '.join(PROTOCOLS)}) and outcome "
            f"({', '.join(OUTCOMES)}).",
            (*version, "protocol", "outcome"),
            registry=registry,
        )
        self.images = Counter("convoy_images", "Images classified.", version, registry=registry)
        self.request_seconds = Histogram(
            "convoy_request_seconds",
            "Seconds from the first byte read to the answer, of answered requests.",
            version,
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "convoy_stage_seconds",
            "Seconds in a stage: read, decode, queue, encode of a request, forward of a batch.",
            (*version, "stage"),
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self.batch_size = Histogram(
            "convoy_batch_size",
            "Images in a forward pass.",
            version,
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.version_switches = Counter(
            "convoy_version_switches",
            "Deployments that this worker switched to, or could not load.",
            ("model_name", "outcome"),
            registry=registry,
        )
        self.serving_version = Gauge(
            "convoy_serving_version",
            "Number of the version that serves; the lowest of all workers.",
            ("model_name",),
            multiprocess_mode="livemin",
            registry=registry,
        )
        self.model_info = Gauge(
            "convoy_model_info",
            "1 for the champion that serves, with its device and its plan.",
            (*version, "device", "plan"),
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.confidence = Histogram(
            "convoy_confidence",
            "Probability of the best class of each answered image.",
            version,
            buckets=_BUCKETS_PROBABILITY,
            registry=registry,
        )
        self.shadow_images = Counter(
            "convoy_shadow_images",
            "Images for the shadow: agreed, differed or failed when scored, or dropped.",
            (*version, "outcome"),
            registry=registry,
        )
        self.queue_depth = Gauge(
            "convoy_queue_depth",
            "Images that wait, summed over the workers.",
            ("model_name",),
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.traces_dropped = Counter(
            "convoy_traces_dropped",
            "Traced requests whose spans were not sent: too many waited, or the collector failed.",
            registry=registry,
        )
        self.last_sync_timestamp_seconds = Gauge(
            "convoy_last_sync_timestamp_seconds",
            "When the puller last agreed with the registry, in seconds since 1970.",
            ("model_name",),
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
