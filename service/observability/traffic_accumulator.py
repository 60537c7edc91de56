"""``TrafficAccumulator``: adds up the metrics of one version for those who decide on a canary."""

from registry.canary.traffic_stats import UNBOUNDED_S, VersionTraffic


class TrafficAccumulator:
    """Sums up the samples of one version for ``VersionTraffic``."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._up_to: dict[float, float] = {}

    def add(self, name: str, labels: dict[str, str], value: float) -> None:
        """Add one sample of the version, from any process.

        Args:
            name: the sample's name, such as ``convoy_requests_total``.
            labels: the sample's labels; requests and shadow images need ``outcome``, buckets
                ``le``.
            value: the count or sum; that of a bucket is cumulative, as Prometheus has it.
        """
        if name == "convoy_requests_total":
            is_error = labels["outcome"] in ("server_error", "overload")
            name = "requests" if labels["outcome"] == "ok" else "errors" if is_error else "other"
        elif name == "convoy_shadow_images_total":
            name = labels["outcome"]
        elif name == "convoy_request_seconds_bucket":
            self._up_to[min(float(labels["le"]), UNBOUNDED_S)] = value
            return
        self._counts[name] = self._counts.get(name, 0) + value

    def traffic(self, version: int) -> VersionTraffic:
        """The sums so far, as the traffic of ``version``; its buckets are not cumulative."""
        bounds = sorted(self._up_to)
        below = [0.0, *(self._up_to[bound] for bound in bounds)]
        names = ("requests", "errors", "agreed", "differed", "failed", "dropped")
        return VersionTraffic(
            version=version,
            seconds=self._counts.get("convoy_request_seconds_sum", 0.0),
            images=int(self._counts.get("convoy_images_total", 0)),
            confidence=self._counts.get("convoy_confidence_sum", 0.0),
            buckets=tuple(
                (bound, int(upper - lower))
                for bound, lower, upper in zip(bounds, below, below[1:], strict=False)
            ),
            **{name: int(self._counts.get(name, 0)) for name in names},
        )
