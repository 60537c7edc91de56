"""One application and engine behind several HTTP servers: our worker, gthread, Granian.

    python -m benchmarks.http_servers [--json FILE] [--quick] [--workloads w1,w2]
                                      [--servers convoy,gthread_8,…] [--repetitions 3]

Needs the extra ``bench``, for Granian. Every server has two workers and one thread a forward pass,
and answers by the same plan with the same settings. ``gthread_N`` is
gunicorn's threaded worker with N threads, ``granian_N`` Granian's WSGI interface with N blocking
threads. W1 and W2 are those of ``benchmarks.serving``. All servers run all the time; the load asks
one after the other, in another order in each repetition, and every figure is the median of the
repetitions. Failures and requests are their sums.

``cpu_ms`` is the CPU time of the server's whole process tree, from /proc before and after a window
(until the last answer has come), by the number of right answers. ``refused`` are answers with 503
or 429; ``failed`` are wrong answers, other errors, and connections that were lost or refused. In
the slow rows 500 clients send a byte of their request each second, of its head or of its body,
beside 32 connections that ask as before (W1): figures are of these 32 only, but ``cpu_ms`` includes
the work for the slow ones, and ``slow_closed`` says how many of them the server closed.

Made for a machine of two cores, which load and servers share and the result names.
``client_cores`` is what the load took of them, and ``other_cores`` what everything else took: where
that is more than a few hundredths (a tenth with slow clients), requests/s say little. Where ``rps``
is 0, the server had answered nobody when the window was over, and ``p99_ms`` is of those whom it
answered once the slow clients had gone.
"""

import json
import random
import statistics
import sys
import time
from importlib.metadata import version
from typing import Any

from tqdm import tqdm

from benchmarks.closed_loop import Figures, Question, load
from benchmarks.common import machine, parser, served_plan
from benchmarks.http_servers.servers import NAMES, Server, running
from benchmarks.http_servers.slow_clients import KINDS, slow_clients
from benchmarks.http_servers.windows import agree, fastest_plan, measure
from benchmarks.serving import prepare

CONNECTIONS = (8, 32, 128, 256, 512)
QUICK_CONNECTIONS = (32, 512)
SECONDS = {"w1": 4.0, "w2": 8.0}
WARM_UP_S = 1.0
HONEST, SLOW = 32, 500
# Before the honest ones ask, the slow ones must hold what they can.
SLOW_SETTLE_S, SLOW_SECONDS = 4.0, 12.0
MEDIANS = ("rps", "p50_ms", "p99_ms", "cpu_ms", "client_cores", "other_cores")
SUMS = ("right", "refused", "failed", "slow_closed")
Runs = dict[str, dict[str, list[Figures]]]
"""By server, and by the number of connections or the kind of slow clients."""


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument(
        "--quick", action="store_true", help="a trial: short, 32 and 512 connections, once"
    )
    options.add_argument("--workloads", default="w1,w2")
    options.add_argument("--servers", default=",".join(NAMES))
    options.add_argument("--repetitions", type=int, default=3)
    arguments = options.parse_args()
    names = arguments.servers.split(",")
    results: dict[str, Any] = {
        **machine(),
        "command": f"python -m benchmarks.http_servers {' '.join(sys.argv[1:])}".strip(),
        "versions": {name: version(name) for name in ("gunicorn", "granian")},
    }
    for workload in arguments.workloads.split(","):
        repetitions = 1 if arguments.quick else arguments.repetitions
        results[workload] = compare(workload, names, repetitions, arguments.quick)
        show(workload, results[workload]["medians"])
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def compare(workload: str, names: list[str], repetitions: int, quick: bool) -> dict[str, Any]:
    """Everything about one workload: the plan, the medians and the raw figures."""
    bundle = prepare(workload)
    model = bundle.manifest.model
    plan = fastest_plan(workload)
    seconds = SECONDS[workload] / (2 if quick else 1)
    runs: Runs = {name: {} for name in names}
    with running(names, f"models:/{model}@champion", plan) as servers:
        plans = {served_plan(server, model) for server in servers.values()}
        if plans != {plan}:
            raise SystemExit(f"the servers answer by {plans} instead of {plan}")
        questions, difference = agree(servers, bundle)
        for server in servers.values():
            load(server.port, 8, WARM_UP_S, questions)
        for job, name in tqdm(jobs(workload, names, repetitions, quick), unit="run", disable=None):
            figures = (
                measure_beside_slow(servers[name], job, questions, quick)
                if job in KINDS
                else measure(servers[name], int(job), seconds, questions)
            )
            runs[name].setdefault(job, []).append(figures)
            time.sleep(0.5)  # the connections that were closed are cleared away
    return {
        "model": model,
        "plan": plan,
        "largest difference between two servers' probabilities": difference,
        "medians": {name: {job: summary(r) for job, r in by.items()} for name, by in runs.items()},
        "runs": runs,
    }


def jobs(workload: str, names: list[str], repetitions: int, quick: bool) -> list[tuple[str, str]]:
    """What to measure of which server, in order; the servers' order differs each time."""
    order = random.Random(0)
    kinds = [
        *map(str, QUICK_CONNECTIONS if quick else CONNECTIONS),
        *(KINDS if workload == "w1" else ()),
    ]
    return [
        (job, name)
        for _ in range(repetitions)
        for job in kinds
        for name in order.sample(names, len(names))
    ]


def measure_beside_slow(
    server: Server, kind: str, questions: list[Question], quick: bool
) -> Figures:
    """One window beside slow clients, who stay a second longer than it."""
    seconds = SLOW_SECONDS / (2 if quick else 1)
    lasting_s = SLOW_SETTLE_S + seconds + 1
    with slow_clients(kind, server.port, SLOW, lasting_s) as closed:
        time.sleep(SLOW_SETTLE_S)
        figures = measure(server, HONEST, seconds, questions)
        figures["slow_closed"] = closed()
    return figures


def summary(runs: list[Figures]) -> Figures:
    """Medians of rates and times, sums of counts."""
    return {key: statistics.median(run[key] for run in runs) for key in MEDIANS} | {
        key: sum(run[key] for run in runs) for key in SUMS if key in runs[0]
    }


def show(workload: str, medians: dict[str, dict[str, Figures]]) -> None:
    columns = ("rps", "p99_ms", "cpu_ms", "other_cores", *SUMS)
    print(f"\n{workload:<8}{'server':<12}" + "".join(f"{name:>12}" for name in columns))
    for job in next(iter(medians.values())):
        for name, by in medians.items():
            shown = "".join(f"{by[job].get(column, 0):>12,.5g}" for column in columns)
            print(f"{job:<8}{name:<12}{shown}")


if __name__ == "__main__":
    sys.exit(main())
