"""Measures promotions back and forth under load: the delay for clients, and how long they take.

    python -m benchmarks.swap_under_load [--swaps 100] [--keep-warm 0] [--json FILE]

Two workers serve two small versions of the digits model. An open-loop client sends requests when
they are due, whether or not answers are late, at 70 % of the rate that the same client reached
without pauses. Meanwhile another process promotes the two versions in turn, with gate and audit
log. With ``--keep-warm 0``, the workers load the version again each time.

An answer has the wrong version in two cases: it is from the old version, although the request was
sent after an answer of the new one had arrived; or its scores are not those of the version that it
names. A swap lasts from the command until half a second after the first answer of the new version.
``p99_ratio`` is the median over the swaps of the p99 during a swap, divided by the p99 of the
second before it. The process that promotes represents an operator's machine, so it gets only CPU
time that no other process wants. The puller and the service run normally.
"""

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common import RunningService, parser, report
from benchmarks.traffic import Row, Traffic, capacity, failed, honest, in_turn
from benchmarks.two_versions import two_versions
from registry.core.paths import Paths

LOAD = 0.7
PAUSE_S = 1.0
_VERSION = re.compile(rb"\r\nX-Model-Version: (\d+)\r\n", re.IGNORECASE)
_SCORE = re.compile(rb'"probability":([0-9.e-]+)')
AFTER_S = 0.5


def main() -> int:
    options = parser("Promotions back and forth under a load of 70 % of the capacity.")
    options.add_argument("--swaps", type=int, default=100)
    options.add_argument("--keep-warm", type=float, default=0.0, metavar="S")
    options.add_argument("--promoter", type=Path, help="internal: run the process that promotes")
    arguments = options.parse_args()
    if arguments.promoter:
        return promote_on_demand(Paths(arguments.promoter))
    os.environ["CONVOY_KEEP_WARM_S"] = str(arguments.keep_warm)
    with two_versions("swap") as (paths, service, image):
        figures = asyncio.run(measure(paths, service, image, arguments.swaps))
    report({"keep_warm_s": arguments.keep_warm, **figures}, arguments.json)
    return 0 if not figures["failed"] and not figures["wrong_version"] else 1


async def measure(
    paths: Paths, service: RunningService, image: bytes, swaps: int
) -> dict[str, Any]:
    ask = honest(service.port, image)
    rps = await capacity(service.port, ask)
    before_mb = memory_mb(service)
    promoter = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.swap_under_load", "--promoter", str(paths.root)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert promoter.stdin
    assert promoter.stdout
    await promoter.stdout.readline()  # the promoter prints a line when it has loaded MLflow
    traffic = Traffic(service.port, in_turn([ask]), LOAD * rps)
    windows: list[tuple[float, float]] = []
    command_s, decided_s = [], []
    async with traffic.running():
        await asyncio.sleep(PAUSE_S)
        for number in tqdm(range(swaps), unit="swap", disable=None):
            version = 2 if number % 2 == 0 else 1
            began = time.perf_counter()
            promoter.stdin.write(b"%d\n" % version)
            seen = len(traffic.rows)
            printed = asyncio.create_task(promoter.stdout.readline())
            first = None
            while first is None:
                await asyncio.sleep(0.005)
                new = (row.done for row in traffic.rows[seen:] if version_of(row) == version)
                first = next(new, None)
                if time.perf_counter() - began > 60:
                    raise SystemExit(f"version {version} has not answered within 60 s")
            decided = float(json.loads(await printed)["decided"])
            command_s.append(first - began)
            decided_s.append(max(0.0, first - decided))
            await asyncio.sleep(AFTER_S)
            windows.append((began, time.perf_counter()))
            await asyncio.sleep(PAUSE_S)
    promoter.stdin.close()
    await promoter.wait()
    return {
        **swap_figures(traffic.rows, windows),
        "capacity_rps": rps,
        "load_rps": LOAD * rps,
        "command_to_first_answer_median_s": statistics.median(command_s),
        "command_to_first_answer_worst_s": max(command_s),
        "decision_to_first_answer_median_s": statistics.median(decided_s),
        "decision_to_first_answer_worst_s": max(decided_s),
        "workers_mb_before": before_mb,
        "workers_mb_after": memory_mb(service),
    }


def version_of(row: Row) -> int | None:
    """The version that answered; None if the request failed."""
    found = _VERSION.search(row.answer) if row.status == 200 else None
    return int(found[1]) if found else None


def swap_figures(rows: list[Row], windows: list[tuple[float, float]]) -> dict[str, Any]:
    """Counts, wrong versions and times of the requests; ``windows`` are the swaps' times."""
    good = [row for row in rows if version_of(row) is not None]
    due, sent, done = np.array([(row.due, row.sent, row.done) for row in good]).T
    version = np.array([version_of(row) for row in good])
    inside = np.zeros(len(due), bool)
    for began, ended in windows:
        inside |= (done >= began) & (done <= ended)
    taken_ms = 1000 * (done - due)
    quiet, swapping = (float(np.percentile(taken_ms[each], 99)) for each in (~inside, inside))
    # Compare each swap with the second before it, because other programs also use this machine.
    ratios = []
    for began, ended in windows:
        before, during = (
            taken_ms[(done >= first) & (done < last)]
            for first, last in ((began - PAUSE_S, began), (began, ended))
        )
        ratios.append(float(np.percentile(during, 99) / np.percentile(before, 99)))
    order = np.argsort(done)
    scores: dict[int | None, bytes] = {}
    wrong = 0
    for row in good:
        score = _SCORE.search(row.answer)
        digits = score[1][:6] if score else b""
        wrong += scores.setdefault(version_of(row), digits) != digits
    # A version is known to serve from its first answer after an answer of the other version.
    turns = order[1:][np.diff(version[order]) != 0]
    for began, ended in windows:
        within = [each for each in turns if began <= done[each] <= ended]
        if within:
            new, known = version[within[0]], done[within[0]]
            late = (sent > known) & (done <= ended) & (version != new)
            wrong += int(late.sum())
    return {
        "requests": len(rows),
        "swaps": len(windows),
        "failed": failed(rows),
        "wrong_version": wrong,
        "p99_ratio": statistics.median(ratios),
        "p99_ratio_of_all_together": swapping / quiet,
        "longest_gap_ms": 1000 * float(np.diff(done[order]).max()),
        "quiet_p99_ms": quiet,
        "swap_p99_ms": swapping,
        "quiet_p50_ms": float(np.percentile(taken_ms[~inside], 50)),
        "swap_p50_ms": float(np.percentile(taken_ms[inside], 50)),
    }


def memory_mb(service: RunningService) -> float:
    """The memory of all workers in MB, without pages that they share with other processes."""
    return sum(worker.memory_full_info().uss for worker in service.workers()) / 1e6


def promote_on_demand(paths: Paths) -> int:
    """Promote the version in each line of stdin, and print the time of the decision."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    from registry.promotion.promotion import promote
    from registry.store.mlflow_store import ModelStore

    store = ModelStore(paths)
    print("ready", flush=True)
    for line in sys.stdin:
        promote(store, "digits", int(line), force=True, reason="benchmark")
        # ``perf_counter`` is the same clock in all processes of a machine.
        print(json.dumps({"decided": paths.decided.stat().st_mtime + offset_s()}), flush=True)
    return 0


def offset_s() -> float:
    """Seconds to add to the wall clock to get ``time.perf_counter``."""
    return time.perf_counter() - time.time()


if __name__ == "__main__":
    sys.exit(main())
