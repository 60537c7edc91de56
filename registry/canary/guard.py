"""Compares a canary with the champion on real traffic, and says why to end it. Pure."""

from scipy.special import bdtrc

from registry.canary.traffic_stats import ServingStatus, VersionTraffic
from registry.model.refs import Canary
from registry.promotion.policy import CanaryPolicy

# Strict, because the guard tests every two seconds: chance must not end a canary within an hour.
SIGNIFICANCE = 1e-4


class CanaryGuard:
    """Guards one canary, from its start on."""

    def __init__(self, canary: Canary, policy: CanaryPolicy, start: ServingStatus) -> None:
        """``start`` has the counts before the canary; the guard subtracts them."""
        self.canary = canary
        self._policy = policy
        self._start = start

    def check(self, status: ServingStatus) -> str | None:
        """Why the canary must end, from the traffic since its start; None while it may go on."""
        challenger = self._since(status, self.canary.version)
        champion = self._since(status, status.champion)
        for worker in status.workers:
            if worker.refused == self.canary.version and worker.error:
                return f"worker {worker.pid} cannot serve the challenger: {worker.error}"
        return (
            self._check_errors(challenger, champion)
            or self._check_latency(challenger, champion)
            or self._check_shadow(challenger)
        )

    def _since(self, status: ServingStatus, version: int | None) -> VersionTraffic:
        return status.of(version).since(self._start.of(version))

    def _check_errors(self, challenger: VersionTraffic, champion: VersionTraffic) -> str | None:
        count = challenger.requests + challenger.errors
        allowed = champion.error_rate + self._policy.max_error_gap
        if count < self._policy.min_requests or not _exceeds(challenger.errors, count, allowed):
            return None
        return (
            f"{challenger.errors} of the challenger's {count} requests failed, "
            f"{champion.error_rate:.2%} of the champion's; allowed: {allowed:.2%}"
        )

    def _check_latency(self, challenger: VersionTraffic, champion: VersionTraffic) -> str | None:
        if min(challenger.requests, champion.requests) < self._policy.min_requests:
            return None
        # The mean is exact, but a few requests that hung can raise it. The median resists that, but
        # is known only to within a bucket. So both must be longer.
        challenger_s, champion_s = (
            challenger.quantile_s(0.5) or 0.0,
            champion.quantile_s(0.5) or 0.0,
        )
        is_slow = challenger.mean_s > self._policy.max_latency_ratio * champion.mean_s
        if not is_slow or challenger_s <= champion_s:
            return None
        return (
            f"the challenger's requests take {1000 * challenger.mean_s:.3g} ms, the champion's "
            f"{1000 * champion.mean_s:.3g} ms; allowed: {self._policy.max_latency_ratio:g} times"
        )

    def _check_shadow(self, challenger: VersionTraffic) -> str | None:
        count, limit = challenger.shadowed, self._policy.min_agreement
        if count < self._policy.min_requests:
            return None
        if _exceeds(challenger.failed, count, self._policy.max_error_gap):
            return f"the challenger failed on {challenger.failed} of {count} images in the shadow"
        if limit is not None and _exceeds(count - challenger.agreed, count, 1 - limit):
            return (
                f"the challenger agrees with the champion on {challenger.agreed} of {count} "
                f"images; allowed: {limit:.2%} at least"
            )
        return None


def _exceeds(events: int, count: int, allowed: float) -> bool:
    """Whether the rate of events is significantly above ``allowed``, a rate from 0 to 1."""
    if events <= allowed * count:
        return False
    # The probability of so many events or more, if the rate is ``allowed``.
    return float(bdtrc(events - 1, count, min(1.0, allowed))) < SIGNIFICANCE
