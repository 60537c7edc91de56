"""What a challenger in the shadow costs the champion's callers.

    python -m benchmarks.shadow [--rounds 5] [--json FILE]

Two small versions of the digits, two workers, the open-loop client at half the capacity. In turn
without a trial and with version 2 scoring every image in the shadow, with the default of a fifth of
the machine's cores; the median times of both are compared, round by round.
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
from benchmarks.open_loop import Driver, find_capacity, two_versions
from registry.contract import Trial
from registry.home import Home
from registry.live import Live
from registry.promotion import release, withdraw
from registry.store import ModelStore

LOAD = 0.5
SETTLE_S = 5.0
MEASURE_S = 6.0


def main() -> int:
    options = parser("What scoring in the shadow costs the champion's callers.")
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    with two_versions("shadow") as (home, service, image):
        figures = asyncio.run(measure(home, service, image, arguments.rounds))
    report(figures, arguments.json)
    return 0


async def measure(home: Home, service: RunningService, image: bytes, rounds: int) -> dict[str, Any]:
    store = ModelStore(home)
    driver = Driver(service.port, image)
    await driver.connect()
    capacity = await find_capacity(driver)
    stop = asyncio.Event()
    load = asyncio.create_task(driver.run(LOAD * capacity, stop))
    p50: dict[bool, list[float]] = {False: [], True: []}
    p99: dict[bool, list[float]] = {False: [], True: []}
    cpu: list[float] = []
    for _ in tqdm(range(rounds), unit="round", disable=None):
        for shadow in (False, True):
            if shadow:
                await asyncio.to_thread(release, store, "digits", Trial(version=2, shadow=1.0))
            elif cpu:
                await asyncio.to_thread(withdraw, store, "digits")
            await asyncio.sleep(SETTLE_S)
            before, used_s = len(driver.answers), shadow_cpu_s(service)
            await asyncio.sleep(MEASURE_S)
            if shadow:
                cpu.append((shadow_cpu_s(service) - used_s) / MEASURE_S / (os.cpu_count() or 1))
            taken = [1000 * (done - due) for due, _, done, _ in driver.answers[before:]]
            p50[shadow].append(float(np.percentile(taken, 50)))
            p99[shadow].append(float(np.percentile(taken, 99)))
    stop.set()
    await load
    ratios = [after / before for before, after in zip(p50[False], p50[True], strict=True)]
    return {
        "requests": len(driver.answers) + driver.failed,
        "failed": driver.failed + driver.lost,
        "load_rps": LOAD * capacity,
        "p50_ms_without": statistics.median(p50[False]),
        "p50_ms_with": statistics.median(p50[True]),
        "p50_ratio": statistics.median(ratios),
        "p99_ms_without": statistics.median(p99[False]),
        "p99_ms_with": statistics.median(p99[True]),
        "shadow_part_of_the_machine": statistics.median(cpu),
        **scored(service),
    }


def shadow_cpu_s(service: RunningService) -> float:
    """What the shadow's process has used; 0 when there is none."""
    for child in service.process.children():
        if "service.shadow" in child.cmdline():
            times = child.cpu_times()
            return float(times.user + times.system)
    return 0.0


def scored(service: RunningService) -> dict[str, int]:
    connection = service.connect()
    connection.request("GET", "/v1/models/digits/traffic")
    found = msgspec.json.decode(connection.getresponse().read(), type=Live).of(2)
    connection.close()
    return {"images_scored": found.shadowed, "images_dropped": found.dropped}


if __name__ == "__main__":
    sys.exit(main())
