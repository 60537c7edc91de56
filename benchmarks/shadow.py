"""Measures how much a shadow delays the champion's clients.

    python -m benchmarks.shadow [--rounds 5] [--json FILE]

Two workers serve two small versions of the digits model, and the open-loop client sends half of the
requests that they could answer. Each round measures once without a shadow, and once with version 2
as a shadow that scores every image, with the default of a fifth of the machine's cores. The median
times of both are compared, round by round. Exits 1 if a request failed, or if the shadow scored
nothing in a round, because such a shadow costs nothing.
"""

import asyncio
import os
import statistics
import sys
from typing import Any

import msgspec
import numpy as np
from tqdm import tqdm

from benchmarks.common import RunningService, parser, report
from benchmarks.traffic import Traffic, capacity, failed, honest, in_turn
from benchmarks.two_versions import two_versions
from registry.canary.traffic_stats import ServingStatus
from registry.core.paths import Paths
from registry.model.refs import Canary
from registry.promotion.promotion import start_canary, stop_canary
from registry.store.mlflow_store import ModelStore

LOAD = 0.5
RECONCILE_TIMEOUT_S = 5.0
MEASURE_S = 6.0


def main() -> int:
    options = parser("Measures how much a shadow delays the champion's clients.")
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    with two_versions("shadow") as (paths, service, image):
        figures = asyncio.run(measure(paths, service, image, arguments.rounds))
    report(figures, arguments.json)
    return 1 if figures["failed"] or not figures["images_scored_least"] else 0


async def measure(
    paths: Paths, service: RunningService, image: bytes, rounds: int
) -> dict[str, Any]:
    store = ModelStore(paths)
    ask = honest(service.port, image)
    rps = await capacity(service.port, ask)
    traffic = Traffic(service.port, in_turn([ask]), LOAD * rps)
    p50: dict[bool, list[float]] = {False: [], True: []}
    p99: dict[bool, list[float]] = {False: [], True: []}
    cpu: list[float] = []
    scores: list[int] = []
    async with traffic.running():
        for turn in tqdm(range(2 * rounds), unit="turn", disable=None):
            shadow = turn % 2 == 1
            if shadow:
                await asyncio.to_thread(
                    start_canary, store, "digits", Canary(version=2, shadow=1.0)
                )
            elif cpu:
                await asyncio.to_thread(stop_canary, store, "digits")
            await asyncio.sleep(RECONCILE_TIMEOUT_S)
            before, used_s = len(traffic.rows), shadow_cpu_s(service)
            scored_before = (await asyncio.to_thread(scored, service))["images_scored"]
            await asyncio.sleep(MEASURE_S)
            if shadow:
                cpu.append((shadow_cpu_s(service) - used_s) / MEASURE_S / (os.cpu_count() or 1))
                scored_now = (await asyncio.to_thread(scored, service))["images_scored"]
                scores.append(scored_now - scored_before)
            taken = [
                1000 * (row.done - row.due) for row in traffic.rows[before:] if row.status == 200
            ]
            p50[shadow].append(float(np.percentile(taken, 50)))
            p99[shadow].append(float(np.percentile(taken, 99)))
    ratios = [after / before for before, after in zip(p50[False], p50[True], strict=True)]
    return {
        "requests": len(traffic.rows),
        "failed": failed(traffic.rows),
        "load_rps": LOAD * rps,
        "p50_ms_without": statistics.median(p50[False]),
        "p50_ms_with": statistics.median(p50[True]),
        "p50_ratio": statistics.median(ratios),
        "p99_ms_without": statistics.median(p99[False]),
        "p99_ms_with": statistics.median(p99[True]),
        "shadow_part_of_the_machine": statistics.median(cpu),
        "images_scored_least": min(scores),
        **scored(service),
    }


def shadow_cpu_s(service: RunningService) -> float:
    """CPU seconds that the shadow's process has used; 0 if there is none."""
    for child in service.process.children():
        if "service.shadow.process" in child.cmdline():
            times = child.cpu_times()
            return float(times.user + times.system)
    return 0.0


def scored(service: RunningService) -> dict[str, int]:
    connection = service.connect()
    connection.request("GET", "/v1/models/digits/traffic")
    found = msgspec.json.decode(connection.getresponse().read(), type=ServingStatus).of(2)
    connection.close()
    return {"images_scored": found.shadowed, "images_dropped": found.dropped}


if __name__ == "__main__":
    sys.exit(main())
