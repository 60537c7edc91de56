"""Measures what traces and the access log cost a service, in CPU time for each request.

    python -m benchmarks.tracing [--workload w1] [--connections 32] [--repetitions 9] [--seconds 2]
                                 [--json FILE]

Each form has a service with two workers, which runs all the time. The forms are: without traces
(twice, which shows the noise); with traces, of which none, one in a hundred or all are sampled; and
with the access log. The load goes to one service after another, in a different order in each
repetition. The collector is a process that discards the spans; its CPU time is not counted.

``cpu_ms`` is the CPU time of all processes of the service for each request, ``workers_ms`` that of
the workers alone, without the process that makes the spans. ``ratio`` is the median, over the
repetitions, of a form's ``workers_ms`` divided by that of ``off`` in the same repetition. 95 % of
the medians of resampled repetitions are between ``low`` and ``high``.
"""

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tqdm import tqdm

from benchmarks.closed_loop import Figures
from benchmarks.common import RunningService, free_port, machine, parser, running_service
from benchmarks.http_servers.servers import Server
from benchmarks.http_servers.windows import agree, fastest_plan, measure
from benchmarks.serving import HOME, WORKERS, prepare

KEYS = ("rps", "p50_ms", "p99_ms", "cpu_ms", "workers_ms", "client_cores")
COLUMNS = (*KEYS, "ratio", "low", "high", "failed")
RATIO = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio"}
FORMS: dict[str, dict[str, str] | None] = {
    "off": None,
    "off_again": None,
    "none_sampled": {"OTEL_TRACES_SAMPLER": "always_off"},
    "1_percent": {**RATIO, "OTEL_TRACES_SAMPLER_ARG": "0.01"},
    "all_sampled": {"OTEL_TRACES_SAMPLER": "always_on"},
    "access_log": {"CONVOY_ACCESS_LOG": "on", "OTEL_SDK_DISABLED": "true"},
}


def main() -> int:
    if sys.argv[1:2] == ["collector"]:
        collect(int(sys.argv[2]))
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--workload", default="w1")
    options.add_argument("--connections", type=int, default=32)
    options.add_argument("--repetitions", type=int, default=9)
    options.add_argument("--seconds", type=float, default=2.0)
    arguments = options.parse_args()
    runs = compare(arguments)
    found = {name: medians(name, runs) for name in runs}
    show(found)
    if arguments.json:
        results = {
            **machine(),
            "command": f"python -m benchmarks.tracing {' '.join(sys.argv[1:])}".strip(),
            "workload": arguments.workload,
            "medians": found,
            "runs": runs,
        }
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def compare(arguments: Any) -> dict[str, list[Figures]]:
    """The figures of every form in every repetition."""
    bundle = prepare(arguments.workload)
    plan = fastest_plan(arguments.workload)
    model = f"models:/{bundle.manifest.model}@champion"
    runs: dict[str, list[Figures]] = {name: [] for name in FORMS}
    with ExitStack() as stack:
        endpoint = stack.enter_context(discarding_collector())
        services, servers = {}, {}
        for name, more in FORMS.items():
            variables = {} if more is None else {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **more}
            service = stack.enter_context(
                running_service(HOME, model, WORKERS, plan=plan, **variables)
            )
            services[name] = service
            servers[name] = Server(service.port, service.process)
        questions, _ = agree(servers, bundle)
        for server in servers.values():
            measure(server, arguments.connections, 1.0, questions)  # warms up
        order = random.Random(0)
        for _ in tqdm(range(arguments.repetitions), unit="repetition", disable=None):
            for name in order.sample(list(servers), len(servers)):
                before_s = workers_cpu_s(services[name])
                found = measure(servers[name], arguments.connections, arguments.seconds, questions)
                used_s = workers_cpu_s(services[name]) - before_s
                found["workers_ms"] = 1000 * used_s / max(1, found["right"])
                runs[name].append(found)
    return runs


def workers_cpu_s(service: RunningService) -> float:
    """CPU seconds that the workers of a service have used."""
    return sum(sum(each.cpu_times()[:2]) for each in service.workers())


def medians(name: str, runs: dict[str, list[Figures]]) -> Figures:
    """The medians of a form's figures, and the ratio of its CPU time with its interval."""
    ratios = [
        a["workers_ms"] / b["workers_ms"] for a, b in zip(runs[name], runs["off"], strict=True)
    ]
    draws = random.Random(0)
    resampled = sorted(
        statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(2_000)
    )
    return {
        **{key: statistics.median(each[key] for each in runs[name]) for key in KEYS},
        "ratio": statistics.median(ratios),
        "low": resampled[50],
        "high": resampled[-51],
        "failed": sum(each["failed"] + each["refused"] for each in runs[name]),
    }


def show(found: dict[str, Figures]) -> None:
    print(" " * 14 + "".join(f"{name:>13}" for name in COLUMNS))
    for name, figures in found.items():
        print(f"{name:<14}" + "".join(f"{figures[key]:>13,.4g}" for key in COLUMNS))


@contextmanager
def discarding_collector() -> Iterator[str]:
    """The URL of a process that takes spans and discards them."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.tracing", "collector", str(port)]
    process = subprocess.Popen(command, env={**os.environ})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def collect(port: int) -> None:
    """Take spans until this process is ended."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    sys.exit(main())
