"""Records of a model's traffic: what each worker serves, and the counts of each version.

The service answers ``GET /v1/models/{name}/traffic`` with them; the canary monitor, the command
line and the control plane read them. Light: records and arithmetic only.
"""

from collections.abc import Iterable, Sequence

import msgspec
from msgspec import Struct

COUNTED = ("requests", "errors", "images", "agreed", "differed", "failed", "dropped")
UNBOUNDED_S = 1e9  # the bound of the last bucket: JSON has no infinity


class WorkerReport(Struct, frozen=True, kw_only=True):
    """What one worker serves of a model, what it has prepared to serve, and what it refuses.

    ``serving_key`` and ``prepared_key`` are ``Deployment.key``. ``error`` says why the worker
    cannot serve the version ``refused``.
    """

    pid: int
    model: str
    version: int | None = None
    generation: int | None = None
    serving_key: int = 0
    prepared_key: int = 0
    error: str | None = None
    refused: int | None = None


class VersionTraffic(Struct, frozen=True, kw_only=True):
    """The counts of one version, since the service started or between two moments.

    ``requests`` were answered; ``errors`` failed by a defect of the service or by overload.
    ``seconds`` is the time that all answered requests took together. ``buckets`` count requests by
    their time: (upper bound in seconds, count), not cumulative. ``confidence`` is the sum over the
    answered ``images`` of the best class's probability. ``agreed``, ``differed`` and ``failed``
    count images that the version scored in the champion's shadow, ``dropped`` those that it had no
    time to score. It has many fields because the difference of two such records needs them all.
    """

    version: int
    requests: int = 0
    errors: int = 0
    buckets: tuple[tuple[float, int], ...] = ()
    seconds: float = 0.0
    images: int = 0
    confidence: float = 0.0
    agreed: int = 0
    differed: int = 0
    failed: int = 0
    dropped: int = 0

    @property
    def error_rate(self) -> float:
        """Errors as a part of all requests that were answered or failed."""
        return self.errors / (self.requests + self.errors) if self.errors else 0.0

    @property
    def mean_s(self) -> float:
        """Mean time of an answered request, in seconds; 0 before the first one."""
        return self.seconds / self.requests if self.requests else 0.0

    @property
    def mean_confidence(self) -> float | None:
        """Mean probability of the best class over the answered images."""
        return self.confidence / self.images if self.images else None

    @property
    def shadowed(self) -> int:
        """Images that the version scored, or failed to score, in the champion's shadow."""
        return self.agreed + self.differed + self.failed

    @property
    def agreement(self) -> float | None:
        """The part of the shadowed images on which the version agrees with the champion."""
        return self.agreed / self.shadowed if self.shadowed else None

    def quantile_s(self, part: float) -> float | None:
        """Seconds within which ``part`` of the requests were answered; linear within a bucket."""
        total = sum(count for _, count in self.buckets)
        seen, lower = 0, 0.0
        for upper, count in self.buckets:
            if count and seen + count >= part * total:
                top = upper if upper < UNBOUNDED_S else lower
                return lower + (top - lower) * (part * total - seen) / count
            seen, lower = seen + count, upper
        return None

    def since(self, before: "VersionTraffic") -> "VersionTraffic":
        """The counts since ``before``; all of them if the service was restarted since."""
        change = self._combined(before, -1)
        counts = [getattr(change, name) for name in COUNTED]
        was_restarted = min([*counts, *(count for _, count in change.buckets)]) < 0
        return self if was_restarted else change

    def plus(self, other: "VersionTraffic") -> "VersionTraffic":
        """The sum of the counts of two services."""
        return self._combined(other, 1)

    def _combined(self, other: "VersionTraffic", sign: int) -> "VersionTraffic":
        counts = dict(self.buckets)
        for upper, count in other.buckets:
            counts[upper] = counts.get(upper, 0) + sign * count
        sums = {
            name: getattr(self, name) + sign * getattr(other, name)
            for name in (*COUNTED, "seconds", "confidence")
        }
        return VersionTraffic(version=self.version, buckets=tuple(sorted(counts.items())), **sums)


class ServingStatus(Struct, frozen=True, kw_only=True):
    """How a model is served: the deployment's generation, the workers, each version's counts."""

    model: str
    generation: int | None
    champion: int | None
    challenger: int | None = None
    workers: tuple[WorkerReport, ...] = ()
    versions: tuple[VersionTraffic, ...] = ()

    def of(self, version: int | None) -> VersionTraffic:
        """The counts of ``version``; zeros if it had no traffic."""
        found = (each for each in self.versions if each.version == version)
        return next(found, VersionTraffic(version=version or 0))


def add_up(found: Sequence[ServingStatus]) -> ServingStatus:
    """Several services as one. Generation, champion and challenger are those of the first."""
    versions: dict[int, VersionTraffic] = {}
    for each in (version for status in found for version in status.versions):
        known = versions.get(each.version)
        versions[each.version] = known.plus(each) if known else each
    workers = tuple(worker for status in found for worker in status.workers)
    return msgspec.structs.replace(
        found[0], workers=workers, versions=tuple(versions[key] for key in sorted(versions))
    )


def refusals(workers: Iterable[WorkerReport]) -> dict[int, str]:
    """The versions that some worker could not load, each with the reason."""
    return {
        worker.refused: worker.error
        for worker in workers
        if worker.refused is not None and worker.error is not None
    }
