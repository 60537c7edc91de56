"""When the guard ends a canary, and what is not enough to end one."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.canary.guard import CanaryGuard
from registry.canary.serving_client import service_addresses
from registry.canary.traffic_stats import (
    UNBOUNDED_S,
    ServingStatus,
    VersionTraffic,
    WorkerReport,
    add_up,
)
from registry.cli.render import traffic_page
from registry.core.errors import UsageError
from registry.model.refs import Canary
from registry.promotion.policy import CanaryPolicy, read_policy

CANARY = Canary(version=2, share=0.1)


def traffic(
    version: int, requests: int, errors: int = 0, ms: float = 4, **more: Any
) -> VersionTraffic:
    buckets = ((0.0025, 0), (0.005, 0), (0.01, 0), (0.05, 0), (UNBOUNDED_S, 0))
    place = next(upper for upper, _ in buckets if ms / 1000 <= upper)
    return VersionTraffic(
        version=version,
        requests=requests,
        errors=errors,
        seconds=requests * ms / 1000,
        buckets=tuple((upper, requests if upper == place else 0) for upper, _ in buckets),
        **more,
    )


def status(*versions: VersionTraffic, **more: Any) -> ServingStatus:
    return ServingStatus(
        model="m", generation=1, champion=1, challenger=2, versions=versions, **more
    )


def check(champion: VersionTraffic, challenger: VersionTraffic, **policy: Any) -> str | None:
    guard = CanaryGuard(CANARY, CanaryPolicy(**policy), status())
    return guard.check(status(champion, challenger))


def test_a_challenger_as_good_as_the_champion_goes_on() -> None:
    assert check(traffic(1, 1000, 2), traffic(2, 100, 0)) is None
    assert check(traffic(1, 1000), traffic(2, 1000, 11)) is None  # 1.1 % may be chance
    assert check(traffic(1, 1000, 500), traffic(2, 100, 55)) is None  # all fail alike
    assert check(traffic(1, 0), traffic(2, 0)) is None


def test_failing_requests_end_a_canary_once_there_are_enough() -> None:
    assert check(traffic(1, 1000), traffic(2, 5, 30)) is None
    assert "40 of the challenger's 100 requests failed" in str(
        check(traffic(1, 1000), traffic(2, 60, 40))
    )
    assert check(traffic(1, 1000), traffic(2, 60, 40), max_error_gap=0.5) is None


def test_a_slow_challenger_ends_a_canary() -> None:
    reason = str(check(traffic(1, 1000, ms=4), traffic(2, 100, ms=40)))
    assert "the challenger's requests take 40 ms, the champion's 4 ms; allowed: 3 times" in reason
    assert check(traffic(1, 1000, ms=0.45), traffic(2, 100, ms=1.05)) is None
    hung = msgspec.structs.replace(traffic(2, 100, ms=4), seconds=50.0)
    assert (
        check(traffic(1, 1000, ms=4), hung) is None
    )  # a few requests that hung raise only the mean
    assert check(traffic(1, 10, ms=4), traffic(2, 100, ms=40)) is None
    assert check(traffic(1, 1000, ms=4), traffic(2, 100, ms=9)) is None


def test_failures_in_the_shadow_end_a_canary_and_disagreement_only_by_policy() -> None:
    failing = traffic(2, 0, agreed=60, failed=40)
    assert "failed on 40 of 100 images" in str(check(traffic(1, 1000), failing))
    differing = traffic(2, 0, agreed=60, differed=40)
    assert check(traffic(1, 1000), differing) is None
    assert "60 of 100" in str(check(traffic(1, 1000), differing, min_agreement=0.9))


def test_a_worker_that_cannot_load_the_challenger_ends_a_canary_at_once() -> None:
    worker = WorkerReport(pid=7, model="m", version=1, error="scores NaN", refused=2)
    guard = CanaryGuard(CANARY, CanaryPolicy(), status())
    assert guard.check(status(workers=(worker,))) == (
        "worker 7 cannot serve the challenger: scores NaN"
    )


def test_the_guard_ignores_requests_from_before_the_canary() -> None:
    before = status(traffic(1, 500), traffic(2, 60, 40))
    guard = CanaryGuard(CANARY, CanaryPolicy(), before)
    assert guard.check(before) is None
    assert guard.check(status(traffic(1, 900), traffic(2, 160, 40))) is None
    assert guard.check(status(traffic(1, 900), traffic(2, 200, 100))) is not None
    # The service was restarted: all that it has counted belongs to this canary.
    assert guard.check(status(traffic(1, 900, 0), traffic(2, 100, 30))) is not None
    again = CanaryGuard(CANARY, CanaryPolicy(), status(traffic(1, 10, 1000), traffic(2, 0)))
    assert again.check(status(traffic(1, 2000, 0), traffic(2, 100, 100))) is not None
    more = CanaryGuard(CANARY, CanaryPolicy(), status(traffic(1, 100, 5), traffic(2, 0)))
    assert more.check(status(traffic(1, 104, 0), traffic(2, 60, 60))) is not None
    assert guard.check(status(traffic(1, 90), traffic(2, 30, 35))) is not None


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=5))
def test_counts_of_services_add_up_and_since_subtracts_them(counts: list[tuple[int, int]]) -> None:
    each = [status(traffic(1, requests, errors)) for requests, errors in counts]
    total = add_up(each).of(1)
    assert total.requests == sum(requests for requests, _ in counts)
    rest = add_up(each[1:]).of(1) if each[1:] else VersionTraffic(version=1)
    assert total.since(rest).requests == each[0].of(1).requests
    assert sum(n for _, n in total.buckets) == total.requests


def test_quantiles_are_within_their_bucket() -> None:
    version = VersionTraffic(version=1, buckets=((0.001, 50), (0.01, 49), (UNBOUNDED_S, 1)))
    assert version.quantile_s(0.25) == pytest.approx(0.0005)
    assert version.quantile_s(0.5) == pytest.approx(0.001)
    assert version.quantile_s(0.99) == pytest.approx(0.01)
    assert version.quantile_s(1.0) == pytest.approx(0.01)
    assert VersionTraffic(version=1).quantile_s(0.5) is None


def test_a_status_survives_json_and_is_printed() -> None:
    worker = WorkerReport(pid=7, model="m", version=1, generation=3, error="waits")
    shown = status(traffic(1, 900), traffic(2, 100, 1, agreed=9, differed=1), workers=(worker,))
    again = msgspec.json.decode(msgspec.json.encode(shown), type=ServingStatus)
    assert again == shown
    text = traffic_page(again)
    for part in ("champion 1", "challenger 2", "0.9000", "≤ 5 ms", "worker 7", "waits"):
        assert part in text


def test_a_policy_file_has_a_table_for_canaries(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("[canary]\nmin_requests = 7\nmin_agreement = 0.9\n")
    assert read_policy(tmp_path / "policy.toml").canary == CanaryPolicy(
        min_requests=7, min_agreement=0.9
    )


def test_commas_separate_the_addresses_of_services() -> None:
    named = {"CONVOY_SERVICE_URL": "http://a:1/, http://b:2,"}
    assert service_addresses(named) == ("http://a:1", "http://b:2")
    assert service_addresses({}) == ("http://127.0.0.1:8080",)
    assert service_addresses({"CONVOY_PORT": "9"}) == ("http://127.0.0.1:9",)
    with pytest.raises(UsageError, match="is not an http"):
        service_addresses({"CONVOY_SERVICE_URL": "file:///etc/passwd"})
