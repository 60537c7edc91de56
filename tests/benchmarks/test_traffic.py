"""The open-loop client counts what failed, and each scenario says what it did not reach."""

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
    """Names one label in the first answer, and another in all that follow."""
    labels = iter([first])
    return lambda body: (200, named(next(labels, later)))


def test_an_answer_with_another_label_than_the_quiet_service_gave_has_failed() -> None:
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


def test_a_capacity_with_refusals_ends_the_benchmark() -> None:
    def refuses_later() -> Callable[[bytes], tuple[int, Any]]:
        rest = half_refused()
        quiet = iter([(200, named("boot"))])
        return lambda body: next(quiet, None) or rest(b"boot") or (500, {})

    with server(refuses_later()) as port, pytest.raises(SystemExit, match="refused_503"):
        asyncio.run(capacity(port, honest(port, b"boot"), seconds=0.5, connections=2))


def test_a_service_that_refuses_when_quiet_ends_the_benchmark() -> None:
    with server(lambda body: (503, {})) as port, pytest.raises(SystemExit, match="answered 503"):
        honest(port, b"boot")


def test_every_scenario_says_what_is_wanted() -> None:
    assert set(SCENARIOS) == set(WANTED)


def test_what_a_scenario_did_not_reach_or_measure_is_named() -> None:
    reached = {"failed": 0, "back_worst_s": 0.5}
    assert missed("kill-workers", reached) == []
    assert missed("kill-workers", {**reached, "failed": 2}) == ["failed is 2, at most 0 was wanted"]
    assert missed("kill-workers", {"failed": 0}) == ["back_worst_s is missing"]
    assert missed("locked-doors", {"opened": ["a form"], "decided": 1}) == [
        "opened is ['a form'], at most 0 was wanted",
        "decided is 1, at most 0 was wanted",
    ]
    assert missed("kill-workers", {**reached, "back_worst_s": float("nan")})
    assert missed("overload", {"goodput_of_peak_by_cores": 0.5})[0].endswith("0.9 was wanted")


@pytest.mark.parametrize(
    "file", sorted(RESULTS.rglob("*.json")), ids=lambda file: str(file.relative_to(RESULTS))
)
def test_every_result_says_when_and_on_what_it_was_measured(file: Path) -> None:
    result = json.loads(file.read_text())
    where = result.get("where", result)
    assert set(machine()) <= set(where)
    assert where["cpu"]
    assert where["instructions"]
