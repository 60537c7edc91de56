"""Measures the header cache, the two-phase round and the kernel's filter separately.

    python -m benchmarks.http_server_parts [--json FILE] [--quick] [--pairs 12] [--ends 200]

The first part measures cost: CPU seconds of the server's process tree per right answer, counted as
in ``benchmarks.http_servers``. It compares the complete worker with workers that lack one part
(``without``). The load is W1 over 32 connections, and for the round also over 8. Each pair starts
all variants again. Each variant gets two windows of load, one in a random order of the variants and
one in the reverse order; both count together. ``ratio`` is the CPU time without the part divided by
the time with it, as the geometric mean over the pairs. ``low`` to ``high`` is its 95 % confidence
interval (Student's t of the logarithms). The filter does nothing until a worker ends, so its ratio
must be 1: it shows what the method finds when there is no difference.

The second part measures what the filter prevents: how many clients are lost while workers end
(``worker_ends``), alternately with and without the filter, in blocks of 50 ends.

The benchmark is made for a machine with two cores, which the load and the servers share. The result
names the machine.
"""

import json
import random
import statistics
import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from tqdm import tqdm

from benchmarks.closed_loop import Figures, Question, failures, load
from benchmarks.common import machine, parser
from benchmarks.http_server_parts.worker_ends import count_losses, listening
from benchmarks.http_servers.servers import GUNICORN_CONFIG, Command, Server, serving
from benchmarks.http_servers.windows import agree, fastest_plan, measure
from benchmarks.serving import prepare

COMPLETE = "service.server.gunicorn_worker.LoopWorker"
WITHOUT = "benchmarks.http_server_parts.without.Without"
CLASSES = {
    "whole": COMPLETE,
    "header cache": f"{WITHOUT}HeaderCache",
    "round": f"{WITHOUT}Rounds",
    "filter": f"{WITHOUT}Filter",
}
CONNECTIONS = {32: tuple(CLASSES), 8: ("whole", "round")}
SECONDS, QUICK_SECONDS = 2.5, 1.0
WARM_UP_S = 1.0
BLOCK_ENDS = 50
Window = tuple[str, int]
"""A variant, and the number of connections."""


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="a short check: 3 pairs, 20 ends")
    options.add_argument("--pairs", type=int, default=12)
    options.add_argument(
        "--ends",
        type=int,
        default=200,
        help="how many workers end with the filter, and how many without",
    )
    arguments = options.parse_args()
    pairs, ends = (3, 20) if arguments.quick else (arguments.pairs, arguments.ends)
    results = {
        **machine(),
        "command": f"python -m benchmarks.http_server_parts {' '.join(sys.argv[1:])}".strip(),
        **compare(pairs, QUICK_SECONDS if arguments.quick else SECONDS),
        "worker ends": watch_ends(ends),
    }
    for title in ("without", "worker ends"):
        for name, figures in results[title].items():
            print(f"{title} {name}: {figures}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def compare(pairs: int, seconds: float) -> dict[str, Any]:
    """The ratio of each part, and the raw figures of each window."""
    bundle = prepare("w1")
    model, plan = f"models:/{bundle.manifest.model}@champion", fastest_plan("w1")
    windows = [(name, count) for count, names in CONNECTIONS.items() for name in names]
    runs: dict[Window, list[list[Figures]]] = {window: [] for window in windows}
    for number in tqdm(range(pairs), unit="pair", disable=None):
        with ExitStack() as stack:
            servers = {
                name: stack.enter_context(serving(worker(path), model, plan))
                for name, path in CLASSES.items()
            }
            questions, _ = agree(servers, bundle)
            for window, figures in measure_pair(servers, questions, windows, seconds, number):
                runs[window].append(figures)
    return {
        "plan": plan,
        "without": {
            f"{name}, {count} connections": summary(runs["whole", count], runs[name, count])
            for name, count in windows
            if name != "whole"
        },
        "runs": {f"{name}, {count} connections": found for (name, count), found in runs.items()},
    }


def worker(path: str) -> Command:
    """The service's gunicorn with another worker class."""
    return lambda port: ["gunicorn", "-c", str(GUNICORN_CONFIG), "--worker-class", path]


def measure_pair(
    servers: dict[str, Server],
    questions: list[Question],
    windows: list[Window],
    seconds: float,
    seed: int,
) -> list[tuple[Window, list[Figures]]]:
    """Each window measured twice."""
    for server in servers.values():
        listening(server)
        load(server.port, 32, WARM_UP_S, questions)
    order = random.Random(seed).sample(windows, len(windows))
    found: dict[Window, list[Figures]] = {window: [] for window in windows}
    for name, connections in (*order, *reversed(order)):
        figures = measure(servers[name], connections, seconds, questions)
        if kinds := failures(figures):
            print(f"{name}, {connections} connections: {kinds}", file=sys.stderr)
        found[name, connections].append(figures)
    return list(found.items())


def summary(complete: list[list[Figures]], without: list[list[Figures]]) -> dict[str, Any]:
    ratio, low, high = ratio_interval([*map(cpu_ms, without)], [*map(cpu_ms, complete)])
    return {
        "ratio": ratio,
        "low": low,
        "high": high,
        "pairs": len(complete),
        "cpu_ms_with": statistics.median(map(cpu_ms, complete)),
        "cpu_ms_without": statistics.median(map(cpu_ms, without)),
        "rps_with": statistics.median(run["rps"] for pair in complete for run in pair),
        "rps_without": statistics.median(run["rps"] for pair in without for run in pair),
    }


def cpu_ms(pair: list[Figures]) -> float:
    """CPU milliseconds per right answer, over the windows together."""
    return 1000 * sum(run["cpu_s"] for run in pair) / sum(run["right"] for run in pair)


def ratio_interval(
    numerators: ArrayLike, denominators: ArrayLike, confidence: float = 0.95
) -> tuple[float, float, float]:
    """The geometric mean of the ratios of pairs, and its interval by Student's t."""
    logs = np.log(numerators) - np.log(denominators)
    error = logs.std(ddof=1) / np.sqrt(len(logs))
    reach = stats.t.ppf((1 + confidence) / 2, len(logs) - 1) * error
    ratio, low, high = np.exp(logs.mean() + reach * np.array([0, -1, 1])).tolist()
    return ratio, low, high


def watch_ends(ends: int) -> dict[str, dict[str, int]]:
    """How often clients had each outcome, alternately with the filter and without it."""
    classes = {"with the filter": COMPLETE, "without it": CLASSES["filter"]}
    found: dict[str, Counter[str]] = {name: Counter() for name in classes}
    for _ in tqdm(range(-(-ends // BLOCK_ENDS)), unit="block", disable=None):
        for name, path in classes.items():
            found[name].update(count_losses(path, min(ends, BLOCK_ENDS)))
    return {name: dict(counts) for name, counts in found.items()}


if __name__ == "__main__":
    sys.exit(main())
