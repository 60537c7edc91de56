"""One window of load on a server: its figures, with the CPU time of the server's processes."""

import time

import psutil

from benchmarks.closed_loop import Figures, Question, load, post
from benchmarks.common import running_service, served_plan
from benchmarks.http_servers.servers import Server
from benchmarks.serving import HOME, NEAR_TIE, TRAINING, WORKERS, predictions
from registry.model.bundle import Bundle

FAILED = ("wrong", "errors", "lost", "not_connected")


def fastest_plan(workload: str) -> str:
    """The plan that ``auto`` chooses for a workload; the benchmark sets it for every server."""
    model = TRAINING[workload][0]
    with running_service(HOME, f"models:/{model}@champion", WORKERS) as service:
        return served_plan(service, model)


def agree(servers: dict[str, Server], bundle: Bundle) -> tuple[list[Question], float]:
    """The requests with their right labels, and the largest difference between probabilities.

    A label is right if the first server gives it the highest probability, or nearly that. The
    difference is between the first server and any other.
    """
    questions, difference = [], 0.0
    for each in bundle.golden():
        picture = bundle.read(each.file)
        first, *others = [predictions(server.port, picture) for server in servers.values()]
        best = max(first.values())
        right = frozenset(label for label, score in first.items() if best - score <= NEAR_TIE)
        questions.append(post(picture, [right]))
        for other in others:
            off = max(abs(score - other.get(label, 0.0)) for label, score in first.items())
            difference = max(difference, off)
    return questions, difference


def measure(server: Server, connections: int, seconds: float, questions: list[Question]) -> Figures:
    """The figures of one window of load, with the server's CPU time."""
    started, busy_s, before_s = time.perf_counter(), machine_cpu_s(), server.cpu_s()
    figures = load(server.port, connections, seconds, questions)
    used_s = server.cpu_s() - before_s
    busy_s, elapsed_s = machine_cpu_s() - busy_s, time.perf_counter() - started
    figures["failed"] = sum(figures[kind] for kind in FAILED)
    figures["cpu_s"] = used_s
    figures["cpu_ms"] = 1000 * used_s / max(1, figures["right"])
    figures["other_cores"] = (busy_s - used_s) / elapsed_s - figures["client_cores"]
    return figures


def machine_cpu_s() -> float:
    """CPU seconds that all processes of the machine and the kernel have used so far."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)
