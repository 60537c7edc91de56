"""Compares HTTP servers with one application and engine: our worker, gthread, Granian.

    python -m benchmarks.http_servers [--json FILE] [--quick] [--workloads w1,w2]
                                      [--servers convoy,gthread_8,…] [--repetitions 3]

Needs the extra ``bench``, for Granian. Every server has two workers, one thread per forward pass,
the same plan and the same settings. ``gthread_N`` is gunicorn's threaded worker with N threads,
``granian_N`` is Granian's WSGI interface with N blocking threads. The workloads W1 and W2 are those
of ``benchmarks.serving``. All servers run all the time. The load goes to one server after another,
in a different order in each repetition. Rates and times are medians of the repetitions, and counts
of answers and failures are sums.

``cpu_ms`` is the CPU time of the server's process tree per right answer. It is read from /proc
before and after a window, which ends with the last answer. ``refused`` counts answers with 503 or
429. ``failed`` counts wrong answers, other errors, and connections that were lost or refused.

In the slow rows, 500 clients send one byte a second of a request's head or body, while 32 ordinary
connections send requests (W1). The figures are those of the 32 connections, except that ``cpu_ms``
includes the work for the slow clients, and ``slow_closed`` counts how often the server closed one
of them.

The benchmark is made for a machine with two cores, which the load and the servers share. The result
names the machine. ``client_cores`` is how many cores the load used, ``other_cores`` how many all
processes besides the load and the server used: if that is more than a few hundredths (a tenth with
slow clients), requests/s mean little. If ``rps`` is 0, the server answered no request within the
window; ``p99_ms`` is then of the requests that it answered after the slow clients had gone.
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
ORDINARY, SLOW = 32, 500  # clients
# The slow clients first need time to occupy as many connections or threads as they can.
SLOW_SETTLE_S, SLOW_SECONDS = 4.0, 12.0
MEDIANS = ("rps", "p50_ms", "p99_ms", "cpu_ms", "client_cores", "other_cores")
SUMS = ("right", "refused", "failed", "slow_closed")
Runs = dict[str, dict[str, list[Figures]]]
"""By server, and by the number of connections or the kind of slow clients."""


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument(
        "--quick", action="store_true", help="a short check: 32 and 512 connections, one repetition"
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
    """The results of one workload: the plan, the medians and the raw figures."""
    bundle = prepare(workload)
    model = bundle.manifest.model
    plan = fastest_plan(workload)
    seconds = SECONDS[workload] / (2 if quick else 1)
    runs: Runs = {name: {} for name in names}
    with running(names, f"models:/{model}@champion", plan) as servers:
        plans = {served_plan(server, model) for server in servers.values()}
        if plans != {plan}:
            raise SystemExit(f"the servers use the plans {plans} instead of {plan}")
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
            time.sleep(0.5)  # until the server has cleared away the closed connections
    return {
        "model": model,
        "plan": plan,
        "largest difference between two servers' probabilities": difference,
        "medians": {name: {job: summary(r) for job, r in by.items()} for name, by in runs.items()},
        "runs": runs,
    }


def jobs(workload: str, names: list[str], repetitions: int, quick: bool) -> list[tuple[str, str]]:
    """The jobs in order, each with its server; the servers' order is random for each job."""
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
    """The figures of one window with slow clients, which stay one second longer than it."""
    seconds = SLOW_SECONDS / (2 if quick else 1)
    lasting_s = SLOW_SETTLE_S + seconds + 1
    with slow_clients(kind, server.port, SLOW, lasting_s) as closed:
        time.sleep(SLOW_SETTLE_S)
        figures = measure(server, ORDINARY, seconds, questions)
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
