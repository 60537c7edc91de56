"""Watches a challenger on real traffic, and says when the policy is broken. Pure."""

from scipy.stats import binomtest

from registry.canary.traffic_stats import ServingStatus, VersionTraffic
from registry.model.refs import Canary
from registry.promotion.policy import CanaryPolicy

# Looked at every two seconds, so that a trial of an hour may not end by chance.
SIGNIFICANCE = 1e-4


class CanaryGuard:
    """One trial from its first moment on."""

    def __init__(self, canary: Canary, policy: CanaryPolicy, begin: ServingStatus) -> None:
        """``begin`` is what was counted before the trial: it counts no more."""
        self.canary = canary
        self._policy = policy
        self._begin = begin

    def check(self, status: ServingStatus) -> str | None:
        """Why the trial must end, by what happened since it began; None while it may go on."""
        challenger = self._since(status, self.canary.version)
        champion = self._since(status, status.champion)
        for worker in status.workers:
            if worker.refused == self.canary.version and worker.error:
                return f"worker {worker.pid} cannot serve it: {worker.error}"
        return (
            self._check_errors(challenger, champion)
            or self._check_latency(challenger, champion)
            or self._check_shadow(challenger)
        )

    def _since(self, status: ServingStatus, version: int | None) -> VersionTraffic:
        return status.of(version).since(self._begin.of(version))

    def _check_errors(self, challenger: VersionTraffic, champion: VersionTraffic) -> str | None:
        count = challenger.requests + challenger.errors
        allowed = champion.error_rate + self._policy.max_error_gap
        if count < self._policy.min_requests or not _exceeds(challenger.errors, count, allowed):
            return None
        return (
            f"{challenger.errors} of its {count} requests failed, "
            f"{champion.error_rate:.2%} of the champion's; allowed: {allowed:.2%}"
        )

    def _check_latency(self, challenger: VersionTraffic, champion: VersionTraffic) -> str | None:
        if min(challenger.requests, champion.requests) < self._policy.min_requests:
            return None
        # The mean is exact, but a few that hung may make it; of the median the bucket is known.
        ours, theirs = challenger.quantile_s(0.5) or 0.0, champion.quantile_s(0.5) or 0.0
        is_slow = challenger.mean_s > self._policy.max_latency_ratio * champion.mean_s
        if not is_slow or ours <= theirs:
            return None
        return (
            f"its requests take {1000 * challenger.mean_s:.3g} ms, the champion's "
            f"{1000 * champion.mean_s:.3g} ms; allowed: {self._policy.max_latency_ratio:g} times"
        )

    def _check_shadow(self, challenger: VersionTraffic) -> str | None:
        count, limit = challenger.shadowed, self._policy.min_agreement
        if count < self._policy.min_requests:
            return None
        if _exceeds(challenger.failed, count, self._policy.max_error_gap):
            return f"{challenger.failed} of {count} images failed in the shadow"
        if limit is not None and _exceeds(count - challenger.agreed, count, 1 - limit):
            return (
                f"it agrees with the champion on {challenger.agreed} of {count} images; "
                f"allowed: {limit:.2%} at least"
            )
        return None


def _exceeds(events: int, count: int, allowed: float) -> bool:
    """Whether so many events are more than ``allowed``, and not by chance."""
    if events <= allowed * count:
        return False
    return float(binomtest(events, count, min(1.0, allowed), "greater").pvalue) < SIGNIFICANCE
