"""The open-loop client counts failures, and each chaos scenario reports the bounds it missed."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos.__main__ import SCENARIOS
from benchmarks.chaos.wanted import WANTED, missed
from benchmarks.common import machine
from benchmarks.traffic import WRONG, Traffic, capacity, failed, honest, in_turn, summary
from tests.benchmarks.test_closed_loop import half_refused, named, server

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def first_then(first: str, later: str) -> Callable[[bytes], tuple[int, Any]]:
    """Answers the first request with one label, and all later requests with another."""
    labels = iter([first])
    return lambda body: (200, named(next(labels, later)))


def test_an_answer_whose_label_differs_from_that_of_the_idle_service_has_failed() -> None:
    async def play(port: int) -> Traffic:
        traffic = Traffic(port, in_turn([honest(port, b"boot")]), rate=50, connections=2)
        async with traffic.running():
            while not traffic.rows:
                await asyncio.sleep(0.01)
        return traffic

    with server(first_then("boot", "bag")) as port:
        rows = asyncio.run(play(port)).rows
    assert {row.status for row in rows} == {WRONG}
    assert summary(rows)["wrong"] == failed(rows) == len(rows)
    assert summary(rows)["ok"] == 0


def test_refusals_while_the_capacity_is_measured_end_the_benchmark() -> None:
    def refuses_later() -> Callable[[bytes], tuple[int, Any]]:
        rest = half_refused()
        first = iter([(200, named("boot"))])
        return lambda body: next(first, None) or rest(b"boot") or (500, {})

    with server(refuses_later()) as port, pytest.raises(SystemExit, match="refused_503"):
        asyncio.run(capacity(port, honest(port, b"boot"), seconds=0.5, connections=2))


def test_a_service_that_refuses_a_request_while_idle_ends_the_benchmark() -> None:
    with server(lambda body: (503, {})) as port, pytest.raises(SystemExit, match="answered 503"):
        honest(port, b"boot")


def test_every_scenario_has_its_bounds() -> None:
    assert set(SCENARIOS) == set(WANTED)


def test_a_scenario_names_the_bounds_that_it_missed_or_did_not_measure() -> None:
    reached = {"failed": 0, "back_worst_s": 0.5}
    assert missed("kill-workers", reached) == []
    assert missed("kill-workers", {**reached, "failed": 2}) == ["failed is 2, at most 0 was wanted"]
    assert missed("kill-workers", {"failed": 0}) == ["back_worst_s is missing"]
    assert missed("access-control", {"opened": ["a form"], "decided": 1}) == [
        "opened is ['a form'], at most 0 was wanted",
        "decided is 1, at most 0 was wanted",
    ]
    assert missed("kill-workers", {**reached, "back_worst_s": float("nan")})
    assert missed("overload", {"goodput_of_peak_by_cores": 0.5})[0].endswith("0.9 was wanted")


@pytest.mark.parametrize(
    "file", sorted(RESULTS.rglob("*.json")), ids=lambda file: str(file.relative_to(RESULTS))
)
def test_every_result_has_its_date_and_machine(file: Path) -> None:
    result = json.loads(file.read_text())
    where = result.get("where", result)
    assert set(machine()) <= set(where)
    assert where["cpu"]
    assert where["instructions"]
