"""Rate limits, in one process and shared by several workers."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.access.rate_limit import SETS, SITE_CALLERS, WAYS, RateLimiter


def test_a_caller_gets_its_rate_and_no_more() -> None:
    limiter = RateLimiter(rate=0.001, burst=10)
    assert sum(limiter.take("ann") == 0 for _ in range(100)) == 10
    assert limiter.take("bob") == 0


def test_a_caller_may_send_again_after_the_returned_wait() -> None:
    limiter = RateLimiter(rate=100, burst=1)
    assert limiter.take("ann") == 0
    if wait_s := limiter.take("ann"):  # on a busy machine, the wait may be over already
        assert wait_s <= 0.01
        time.sleep(wait_s)
        assert limiter.take("ann") == 0


def test_workers_share_a_callers_bucket(tmp_path: Path) -> None:
    one, other = (RateLimiter(rate=0.001, burst=4, folder=tmp_path) for _ in range(2))
    waits = [each.take("ann") for each in (one, other, one, other, one, other)]
    assert [wait == 0 for wait in waits] == [True] * 4 + [False] * 2
    assert (tmp_path / "buckets").stat().st_size < 2_000_000


def test_callers_cannot_choose_each_others_entries(tmp_path: Path) -> None:
    places = set()
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert RateLimiter(rate=0.1, burst=1, folder=folder).take("192.0.2.7") == 0
        table = (folder / "buckets").read_bytes()
        places.add(
            next(place for place in range(0, len(table), 16) if any(table[place : place + 8]))
        )
    assert len(places) > 10


@pytest.mark.parametrize(
    ("address", "same"),
    [
        ("2001:db8::1", "2001:db8::4d23"),
        ("::ffff:192.0.2.8", "192.0.2.8"),
        ("203.0.113.7:51000", "203.0.113.7"),
        ("[2001:db8::5]:80", "2001:db8::6"),
    ],
)
def test_addresses_of_one_caller_share_a_bucket(address: str, same: str) -> None:
    limiter = RateLimiter(rate=0.001, burst=1)
    assert limiter.take(address) == 0
    assert limiter.take(same) > 0


@pytest.mark.parametrize(
    ("address", "other"), [("2001:db8::1", "2001:db8:0:1::1"), ("192.0.2.7", "192.0.2.8")]
)
def test_addresses_of_two_callers_have_two_buckets(address: str, other: str) -> None:
    limiter = RateLimiter(rate=0.001, burst=1)
    assert limiter.take(address) == 0
    assert limiter.take(other) == 0


def test_the_networks_of_one_ipv6_site_together_get_sixteen_rates() -> None:
    limiter = RateLimiter(rate=0.001, burst=2)
    admitted = sum(limiter.take(f"2001:db8:0:{network:x}::1") == 0 for network in range(1000))
    assert admitted == 32
    assert limiter.take("2001:db8:1::1") == 0


@pytest.mark.parametrize("attackers", ["one site", "many addresses"])
def test_a_flood_of_addresses_does_not_get_an_honest_caller_refused(attackers: str) -> None:
    limiter = RateLimiter(rate=0.001, burst=20)
    for number in range(3 * SETS * WAYS if attackers == "one site" else 100_000):
        site = f"2001:db8:0:{number % 65536:x}::1"
        limiter.take(
            site
            if attackers == "one site"
            else f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        )
    honest = [f"198.51.{number >> 8}.{number & 255}" for number in range(1000)]
    refused = sum(limiter.take(caller) > 0 for caller in honest for _ in range(10))
    assert refused == 0


def test_a_request_refused_for_its_site_does_not_count_for_its_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_ns = 10**12
    clock = SimpleNamespace(monotonic_ns=lambda: now_ns)
    monkeypatch.setattr("service.access.rate_limit.time", clock)
    limiter = RateLimiter(rate=1, burst=1)
    for network in range(SITE_CALLERS):
        assert limiter.take(f"2001:db8:0:{network + 1:x}::1") == 0
    assert all(limiter.take("2001:db8::1") > 0 for _ in range(100))
    now_ns += (
        2 * 10**9 // SITE_CALLERS
    )  # enough for the site, too little for a network that was counted
    assert limiter.take("2001:db8::1") == 0
