"""``python -m benchmarks.containers WHAT --json FILE``: the stack of docker-compose.yml under load.

``faults`` sends a steady load through the proxy, while replicas are killed, scaled and replaced,
versions change, and the registry is stopped. ``replicas`` counts answers per second by 1, 2 and 4
replicas of half a core. Uses a Docker engine that is running, or starts one and ends it afterwards.
The exit status is 1 if a request failed.
"""

import asyncio
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.common import parser, report
from benchmarks.traffic import (
    Row,
    Traffic,
    between,
    capacity,
    draw,
    failed,
    honest,
    in_turn,
    summary,
)
from tests.containers.stack import ROOT, Stack, base_images, engine, say

LOAD = 0.6
CALM_S = 10.0
# Small pictures for a large network: the service is then the bottleneck, and not the client.
HEAVY = ("--data", "digits", "--recipe", "resnet", "--set", "widths=256,512")
Step = Callable[[], Awaitable[Any]]


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("what", choices=("faults", "replicas"))
    options.add_argument("--picture", type=Path, metavar="FILE")
    options.add_argument("--gone", type=float, default=120, help="seconds without MLflow")
    options.add_argument("--cpus", type=float, default=0.5, help="of a replica (replicas)")
    options.add_argument("--rounds", type=int, default=3)
    arguments = options.parse_args()
    with engine() as environment, tempfile.TemporaryDirectory() as work:
        base_images(environment)
        is_heavy = arguments.what == "replicas"
        limits = {"CONVOY_CPUS": str(arguments.cpus), "CONVOY_WORKERS": "1"} if is_heavy else {}
        model = "digits" if is_heavy else "fashion"
        stack = Stack(environment, Path(work), CONVOY_MODEL=f"models:/{model}@champion", **limits)
        try:
            stack.build("proxy", "service", "puller", "trainer")
            stack.up(replicas=1 if is_heavy else 2)
            stack.wait_healthy("mlflow", "control")
            stack.train(*(HEAVY if is_heavy else ()), model=model)
            stack.registry("promote", model, "challenger")
            stack.wait_for_version(1)
            picture = stack.picture("digits" if is_heavy else "fashion-mnist")
            if is_heavy:
                figures = replicas(stack, picture, arguments.rounds) | {"cpus": arguments.cpus}
            else:
                stack.train("--seed", "1")
                figures, traffic = asyncio.run(faults(stack, picture, arguments.gone))
                if arguments.picture:
                    draw(traffic, arguments.picture, "A steady load through the proxy")
        finally:
            stack.down()
    report({"what": arguments.what, **figures}, arguments.json)
    return 1 if figures["failed"] else 0


async def faults(stack: Stack, picture: bytes, gone_s: float) -> tuple[dict[str, Any], Traffic]:
    """Cause each fault after ten calm seconds, under a load of 60 % of the stack's capacity."""
    ask = honest(stack.port, picture)
    peak = await capacity(stack.port, ask, 8)
    rate = LOAD * peak
    say(f"capacity {peak:.0f} answers/s; sending {rate:.0f} requests/s from now on")
    traffic = Traffic(stack.port, in_turn([ask]), rate, 32)
    table: dict[str, dict[str, Any]] = {}
    retried = _retries(stack)

    def thread(step: Callable[..., Any], *arguments: Any, **more: Any) -> Step:
        return lambda: asyncio.to_thread(step, *arguments, **more)

    async def killed() -> None:
        for _ in range(3):
            victim = (await asyncio.to_thread(stack.replicas))[0]
            await asyncio.to_thread(stack.docker, "kill", "--signal", "KILL", victim)
            await asyncio.sleep(3)
            await asyncio.to_thread(stack.docker, "start", victim)
            await asyncio.to_thread(stack.wait_healthy, "service")

    async def scaled() -> None:
        for count in (4, 1, 2):
            await asyncio.to_thread(stack.up, "service", replicas=count)
            await asyncio.to_thread(stack.wait_healthy, "service")
            await asyncio.sleep(3)

    async def promoted() -> None:
        command = ("promote", "fashion", "2", "--force", "--reason", "benchmark")
        await asyncio.to_thread(stack.registry, *command)
        await asyncio.to_thread(stack.wait_for_version, 2)
        await asyncio.sleep(3)
        await asyncio.to_thread(stack.registry, "roll-back", "fashion", "--reason", "benchmark")
        await asyncio.to_thread(stack.wait_for_version, 1)

    async def without_registry() -> None:
        await asyncio.to_thread(stack.compose, "stop", "mlflow")
        await asyncio.sleep(gone_s)
        await asyncio.to_thread(stack.compose, "start", "mlflow")
        await asyncio.to_thread(stack.wait_healthy, "mlflow")

    steps: dict[str, Step] = {
        "a replica killed with SIGKILL, three times": killed,
        "scaled 2 → 4 → 1 → 2": scaled,
        "every replica replaced (deploy/update.sh)": thread(_update, stack),
        "promoted and rolled back": promoted,
        f"MLflow stopped for {gone_s:.0f} s": without_registry,
        "PostgreSQL restarted": thread(stack.compose, "restart", "database"),
    }
    async with traffic.running():
        for name, step in steps.items():
            await asyncio.sleep(CALM_S + 1)
            calm = time.perf_counter() - CALM_S, time.perf_counter()
            say(name)
            traffic.fault(name)
            await step()
            await asyncio.sleep(2)
            again = _retries(stack)
            table[name] = {
                "seconds": round(time.perf_counter() - calm[1], 1),
                "asked_again_by_the_proxy": again - retried,
                "window": (*calm, time.perf_counter()),
            }
            retried = again
    for row in table.values():
        begin, middle, end = row.pop("window")
        row |= _figures(between(traffic.rows, begin, middle), between(traffic.rows, middle, end))
    return {
        "peak_per_s": round(peak),
        "rate_per_s": round(rate),
        "requests": len(traffic.rows),
        "failed": failed(traffic.rows),
        "faults": table,
    }, traffic


def _figures(before: list[Row], during: list[Row]) -> dict[str, Any]:
    found = summary(during)
    return {
        "requests": len(during),
        "failed": failed(during),
        "p99_before_ms": summary(before).get("p99_ms"),
        "p99_during_ms": found.get("p99_ms"),
        "worst_ms": found.get("worst_ms"),
    }


def replicas(stack: Stack, picture: bytes, rounds: int) -> dict[str, Any]:
    """Answers per second of 1, 2 and 4 replicas, in turn, and their medians / (N × that of 1)."""
    rates: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for number in range(rounds):
        for count, found in rates.items():
            stack.up("service", replicas=count)
            stack.wait_healthy("service")
            time.sleep(4)
            ask = honest(stack.port, picture)
            found.append(asyncio.run(capacity(stack.port, ask, 10, connections=8 * count)))
            say(f"round {number + 1}: {count} replicas: {found[-1]:.1f} answers/s")
    medians = {count: statistics.median(found) for count, found in rates.items()}
    return {
        "failed": 0,  # ``capacity`` ends the benchmark if a request fails
        "answers_per_s": {
            str(count): [round(x, 1) for x in found] for count, found in rates.items()
        },
        "of_linear": {
            str(count): round(median / (count * medians[1]), 3) for count, median in medians.items()
        },
    }


def _update(stack: Stack) -> None:
    subprocess.run(["deploy/update.sh"], cwd=ROOT, env=stack.environment, check=True)


def _retries(stack: Stack) -> int:
    """The number of requests that the proxy repeated, by its own metrics."""
    (proxy,) = stack.compose("ps", "-q", "proxy").split()
    template = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    address = stack.docker("inspect", "-f", template, proxy)
    with urllib.request.urlopen(f"http://{address}:8404/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = re.search(r'haproxy_backend_retry_warnings_total\{proxy="replicas"\} (\d+)', text)
    assert found, text[:500]
    return int(found[1])


if __name__ == "__main__":
    sys.exit(main())
