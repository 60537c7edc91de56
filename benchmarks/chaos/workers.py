"""Scenarios 1 to 3: workers and services are killed, restarted or stopped."""

import asyncio
import itertools
import os
import signal
import time
from typing import Any

from benchmarks.chaos.stack import BehindNginx, paths_of_two, service, two_behind_nginx
from benchmarks.common import RunningService
from benchmarks.traffic import REFUSED, Traffic, capacity, failed, honest, in_turn, summary

LOAD = 0.5  # of the services' capacity
# While one service restarts, the other has half of the cores, and the start takes one.
RESTART_LOAD = 0.15


def kill_workers(seconds: int = 60) -> tuple[dict[str, Any], Traffic]:
    """A worker of two services behind nginx is killed with SIGKILL each second."""
    with two_behind_nginx() as stack:
        return asyncio.run(_kill_workers(stack, seconds))


async def _kill_workers(stack: BehindNginx, seconds: int) -> tuple[dict[str, Any], Traffic]:
    ask = honest(stack.port, stack.image)
    rate = LOAD * await capacity(stack.port, ask)
    traffic = Traffic(stack.port, in_turn([ask]), rate)
    back_s = []
    async with traffic.running():
        await asyncio.sleep(5)
        began = time.perf_counter()
        for running in itertools.islice(itertools.cycle(stack.services), seconds):
            started = time.perf_counter()
            workers = running.workers()
            if workers:
                traffic.fault("kill -9")
                os.kill(workers[0].pid, signal.SIGKILL)
                back_s.append(await _until_ready(running.port, started))
            await asyncio.sleep(max(0.0, 1 - (time.perf_counter() - started)))
        ended = time.perf_counter()
        await asyncio.sleep(3)
    rows = traffic.rows
    calm = [row for row in rows if row.due < began]
    figures = {
        "kills": len(back_s),
        "asked_again_by_nginx": stack.asked_again(),
        "seconds": ended - began,
        "rate": rate,
        **summary(rows),
        "failed": failed(rows),
        "quiet_p99_ms": summary(calm)["p99_ms"],
        "back_median_s": sorted(back_s)[len(back_s) // 2],
        "back_worst_s": max(back_s),
    }
    return figures, traffic


async def _until_ready(port: int, since: float) -> float:
    """Wait until the service is ready; returns the seconds since ``since``."""
    await asyncio.sleep(0.02)
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(100), 5)
            writer.close()
            if b" 200 " in answer:
                return time.perf_counter() - since
        except (OSError, TimeoutError):
            pass
        await asyncio.sleep(0.02)


def rolling_restarts(restarts: int = 20) -> tuple[dict[str, Any], Traffic]:
    """Two services behind nginx are restarted in turn, under load."""
    with two_behind_nginx() as stack:
        return asyncio.run(_restart(stack, restarts))


async def _restart(stack: BehindNginx, restarts: int) -> tuple[dict[str, Any], Traffic]:
    ask = honest(stack.port, stack.image)
    rate = RESTART_LOAD * await capacity(stack.port, ask)
    traffic = Traffic(stack.port, in_turn([ask]), rate)
    loop = asyncio.get_running_loop()
    async with traffic.running():
        await asyncio.sleep(8)
        began = time.perf_counter()
        for number in range(restarts):
            running = stack.services[number % 2]
            traffic.fault("restart")
            await loop.run_in_executor(None, running.stop)
            await loop.run_in_executor(None, running.start)
            await asyncio.sleep(0.5)
        ended = time.perf_counter()
        await asyncio.sleep(1)
    rows = traffic.rows
    quiet = summary([row for row in rows if row.due < began])
    during = summary([row for row in rows if began <= row.due < ended])
    figures = {
        "restarts": restarts,
        "asked_again_by_nginx": stack.asked_again(),
        "seconds": ended - began,
        "rate": rate,
        **summary(rows),
        "failed": failed(rows),
        "quiet_p99_ms": quiet["p99_ms"],
        "during_p99_ms": during["p99_ms"],
        "p99_ratio": during["p99_ms"] / quiet["p99_ms"],
    }
    return figures, traffic


def sigterm(times: int = 20) -> tuple[dict[str, Any], Traffic]:
    """SIGTERM under load: 16 clients with keep-alive connections, and no proxy in between."""
    with paths_of_two() as (paths, image), service(paths) as running:
        return asyncio.run(_sigterm(running, image, times))


async def _sigterm(
    running: RunningService, image: bytes, times: int
) -> tuple[dict[str, Any], Traffic]:
    loop = asyncio.get_running_loop()
    traffic = Traffic(running.port, in_turn([honest(running.port, image)]), 0)
    took_s = []
    for _ in range(times):
        async with traffic.running():
            await asyncio.sleep(1.5)
            traffic.fault("SIGTERM")
            running.process.terminate()
            await loop.run_in_executor(None, running.process.wait)
            last = max(row.done for row in traffic.rows if row.status != REFUSED)
        took_s.append(last - traffic.faults[-1][0])
        await loop.run_in_executor(None, running.start)
    figures = {
        "times": times,
        **summary(traffic.rows),
        "last_answer_median_s": sorted(took_s)[times // 2],
    }
    return figures, traffic
