"""Promotions back and forth under load: what they cost the clients, and how long they take.

    python -m benchmarks.swap_under_load [--swaps 100] [--keep-warm 0] [--json FILE]

Makes a home of its own with two small versions of the digits and serves it with two workers. An
open-loop client (requests are sent when they are due, late answers or not) asks at 70 % of the rate
that the same client reached without pauses. Meanwhile another process promotes one version after
the other, with gate and ledger; with ``--keep-warm 0`` each of them is loaded anew.

An answer has the wrong version if it is the old one though the request was sent after an answer of
the new one had come, or if its scores are not those of the version that it names. A swap lasts from
the command until half a second after the first answer of the new version; ``p99_ratio`` is the
median over the swaps of its p99 by that of the second before it. The process that promotes stands
for an operator's machine, so it takes only what the cores have left; puller and service run as they
always do.
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
    options.add_argument("--promoter", type=Path, help="the process that promotes; not for people")
    arguments = options.parse_args()
    if arguments.promoter:
        return promote_on_demand(Paths(arguments.promoter))
    os.environ["CONVOY_KEEP_WARM_S"] = str(arguments.keep_warm)
    with two_versions("swap") as (paths, service, image):
        figures = asyncio.run(measure(paths, service, image, arguments.version_switches))
    report({"keep_warm_s": arguments.keep_warm, **figures}, arguments.json)
    return 0 if not figures["failed"] and not figures["wrong_version"] else 1


async def measure(
    paths: Paths, service: RunningService, image: bytes, version_switches: int
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
    await promoter.stdout.readline()  # it has loaded MLflow
    traffic = Traffic(service.port, in_turn([ask]), LOAD * rps)
    windows: list[tuple[float, float]] = []
    command_s, decided_s = [], []
    async with traffic.running():
        await asyncio.sleep(PAUSE_S)
        for number in tqdm(range(version_switches), unit="swap", disable=None):
            version = 2 if number % 2 == 0 else 1
            began = time.perf_counter()
            promoter.stdin.write(b"%d\n" % version)
            seen = len(traffic.rows)
            said = asyncio.create_task(promoter.stdout.readline())
            first = None
            while first is None:
                await asyncio.sleep(0.005)
                new = (row.done for row in traffic.rows[seen:] if version_of(row) == version)
                first = next(new, None)
                if time.perf_counter() - began > 60:
                    raise SystemExit(f"version {version} has not answered within 60 s")
            decided = float(json.loads(await said)["decided"])
            command_s.append(first - began)
            decided_s.append(max(0.0, first - decided))
            await asyncio.sleep(AFTER_S)
            windows.append((began, time.perf_counter()))
            await asyncio.sleep(PAUSE_S)
    promoter.stdin.close()
    await promoter.wait()
    return {
        **run_gate(traffic.rows, windows),
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
    """The version that answered; None of what is no answer."""
    found = _VERSION.search(row.answer) if row.status == 200 else None
    return int(found[1]) if found else None


def run_gate(rows: list[Row], windows: list[tuple[float, float]]) -> dict[str, Any]:
    good = [row for row in rows if version_of(row) is not None]
    due, sent, done = np.array([(row.due, row.sent, row.done) for row in good]).T
    version = np.array([version_of(row) for row in good])
    inside = np.zeros(len(due), bool)
    for began, ended in windows:
        inside |= (done >= began) & (done <= ended)
    taken_ms = 1000 * (done - due)
    quiet, swapping = (float(np.percentile(taken_ms[each], 99)) for each in (~inside, inside))
    # Each swap against the quiet moments right before it: others use this machine, too.
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
        mine = score[1][:6] if score else b""
        wrong += scores.setdefault(version_of(row), mine) != mine
    # The moment from which each version was known to serve: its first answer after the other's.
    turns = order[1:][np.diff(version[order]) != 0]
    for began, ended in windows:
        within = [each for each in turns if began <= done[each] <= ended]
        if within:
            fresh, known = version[within[0]], done[within[0]]
            late = (sent > known) & (done <= ended) & (version != fresh)
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
    """Of all workers, without what they share with others."""
    return sum(worker.memory_full_info().uss for worker in service.workers()) / 1e6


def promote_on_demand(paths: Paths) -> int:
    """Promote the version of each line that comes, and say when that was decided."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    from registry.promotion.promotion import promote
    from registry.store.mlflow_store import ModelStore

    store = ModelStore(paths)
    print("ready", flush=True)
    for line in sys.stdin:
        promote(store, "digits", int(line), force=True, reason="benchmark")
        # The clock of all processes of a machine.
        print(json.dumps({"decided": paths.decided.stat().st_mtime + offset_s()}), flush=True)
    return 0


def offset_s() -> float:
    """From the wall clock to ``time.perf_counter``."""
    return time.perf_counter() - time.time()


if __name__ == "__main__":
    sys.exit(main())
