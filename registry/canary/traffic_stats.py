"""What the workers of a service say of a model: who serves what, and how each version does.

The service answers with it (``GET /v1/models/{name}/traffic``); whoever compares versions, or
guards a trial, reads it. Light: records and arithmetic only.
"""

from collections.abc import Iterable, Sequence

import msgspec
from msgspec import Struct

COUNTED = ("requests", "errors", "images", "agreed", "differed", "failed", "dropped")
UNBOUNDED_S = 1e9  # the bound of the last bucket: JSON has no infinity


class WorkerReport(Struct, frozen=True, kw_only=True):
    """What one worker serves of a model, what it has ready to serve, and what it refuses.

    Keys are those of deployments (``Deployment.key``). ``error`` says why the worker cannot serve
    the version ``refused``.
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
    """What one version did, counted since the service started or between two moments.

    ``errors`` are ours or for want of room, ``seconds`` what all answered took together.
    ``buckets`` are requests by their time, each with its upper bound in seconds, not cumulative.
    ``agreed``, ``differed`` and ``failed`` are images that were scored in the shadow of the
    champion's answers, ``dropped`` those that there was no time for.
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
        """Of the requests that were answered or failed so."""
        return self.errors / (self.requests + self.errors) if self.errors else 0.0

    @property
    def mean_s(self) -> float:
        return self.seconds / self.requests if self.requests else 0.0

    @property
    def mean_confidence(self) -> float | None:
        """Mean probability of the best class, of the images that were answered."""
        return self.confidence / self.images if self.images else None

    @property
    def shadowed(self) -> int:
        return self.agreed + self.differed + self.failed

    @property
    def agreement(self) -> float | None:
        """Of the images that were scored in the shadow, the part with the champion's answer."""
        return self.agreed / self.shadowed if self.shadowed else None

    def quantile_s(self, part: float) -> float | None:
        """The time within which ``part`` of the requests were answered, linear within a bucket."""
        total = sum(count for _, count in self.buckets)
        seen, lower = 0, 0.0
        for upper, count in self.buckets:
            if count and seen + count >= part * total:
                top = upper if upper < UNBOUNDED_S else lower
                return lower + (top - lower) * (part * total - seen) / count
            seen, lower = seen + count, upper
        return None

    def since(self, before: "VersionTraffic") -> "VersionTraffic":
        """What came after ``before``; all of it where the service was started anew since."""
        change = self._combined(before, -1)
        counts = [getattr(change, name) for name in COUNTED]
        is_new = min([*counts, *(count for _, count in change.buckets)]) < 0
        return self if is_new else change

    def plus(self, other: "VersionTraffic") -> "VersionTraffic":
        """Of two services together."""
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
    """A model as it is served: the release's generation, its workers, and what versions did."""

    model: str
    generation: int | None
    champion: int | None
    challenger: int | None = None
    workers: tuple[WorkerReport, ...] = ()
    versions: tuple[VersionTraffic, ...] = ()

    def of(self, version: int | None) -> VersionTraffic:
        """What ``version`` did; nothing, if it was not seen."""
        found = (each for each in self.versions if each.version == version)
        return next(found, VersionTraffic(version=version or 0))


def add_up(found: Sequence[ServingStatus]) -> ServingStatus:
    """Several services as one; who serves what is as the first says."""
    versions: dict[int, VersionTraffic] = {}
    for each in (version for status in found for version in status.versions):
        known = versions.get(each.version)
        versions[each.version] = known.plus(each) if known else each
    workers = tuple(worker for status in found for worker in status.workers)
    return msgspec.structs.replace(
        found[0], workers=workers, versions=tuple(versions[key] for key in sorted(versions))
    )


def refusals(workers: Iterable[WorkerReport]) -> dict[int, str]:
    """Versions that a worker could not load, and why."""
    return {
        worker.refused: worker.error
        for worker in workers
        if worker.refused is not None and worker.error is not None
    }
