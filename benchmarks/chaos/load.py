"""Scenarios 6, 7 and 18: more requests than the service can answer, and slow clients."""

import asyncio
import random
import time
from pathlib import Path
from typing import Any

from benchmarks.chaos.stack import paths_of_two, service
from benchmarks.common import RunningService, running_service
from benchmarks.traffic import (
    Traffic,
    between,
    capacity,
    failed,
    get,
    honest,
    in_turn,
    post,
    summary,
)
from benchmarks.two_versions import run
from registry.core.paths import Paths
from training.data.sources import load_dataset

TIMES = 10
PEAK_S = 8.0
# With more connections, the service would refuse some requests.
PEAK_CONNECTIONS = 8
SLOW = 500
SLOW_MODEL = "models:/slow@champion"
IMAGE_PX = 224


def overload(seconds: int = 60) -> tuple[dict[str, Any], Traffic]:
    """Ten times as many requests as the service can answer, open loop, for a slow network."""
    with paths_of_two() as (paths, _):
        image = publish_slow(paths)
        with running_service(paths.root, SLOW_MODEL, plan="torch-eager") as running:
            return asyncio.run(_overload(running, image, seconds))


def publish_slow(paths: Paths) -> bytes:
    """Publish a ResNet-18 at 224×224, trained for one epoch; returns a picture for it."""
    digits = load_dataset("digits", paths.datasets).test
    folder = paths.root / "pictures"
    for number in range(10):
        for copy in range(12):
            target = folder / str(number) / f"{copy}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(digits.encode(number * 12 + copy))
    data = ("--data", f"folder:{folder}", "--image-size", str(IMAGE_PX))
    run(paths, "training", *data, "--recipe", "resnet18", "--set", "epochs=1", "--model", "slow")
    run(paths, "registry", "promote", "slow", "1")
    run(paths, "registry", "pull", SLOW_MODEL)
    return Path(folder / "0" / "0.png").read_bytes()


async def _overload(
    running: RunningService, image: bytes, seconds: int
) -> tuple[dict[str, Any], Traffic]:
    ask = honest(running.port, image)
    used = _cpu_s(running)
    peak = await capacity(running.port, ask, PEAK_S, PEAK_CONNECTIONS)
    peak_cores = (_cpu_s(running) - used) / PEAK_S
    calm = Traffic(running.port, in_turn([ask]), 0.6 * peak)
    probes = Traffic(running.port, in_turn([get("/livez", "livez")]), 10, connections=4)
    excess = Traffic(running.port, in_turn([ask]), TIMES * peak, connections=256)
    excess.began = calm.began
    async with probes.running():
        async with calm.running():
            await asyncio.sleep(5)
        excess.fault(f"{TIMES} × as many")
        began, used, own = time.perf_counter(), _cpu_s(running), time.process_time()
        async with excess.running():
            await asyncio.sleep(seconds)
            ended = time.perf_counter()
            cores = (_cpu_s(running) - used) / (ended - began)
            own_cores = (time.process_time() - own) / (ended - began)
        excess.fault("as before")
        after = Traffic(running.port, in_turn([ask]), 0.6 * peak)
        stopped = time.perf_counter()
        async with after.running():
            await asyncio.sleep(8)
    settled = between(excess.rows, began + 2, ended)
    answered = between(excess.rows, began + 2, ended, by="done")
    good = [row for row in answered if row.status == 200]
    during = summary(settled)
    alive_ms = [1000 * (row.done - row.due) for row in probes.rows if began <= row.due < ended]
    before = summary(calm.rows)
    figures = {
        "peak_rps": peak,
        "offered_rps": TIMES * peak,
        "seconds": seconds,
        **during,
        "goodput_of_peak": len(good) / (ended - began - 2) / peak,
        # The clients run on the same cores, so the workers have fewer.
        "cores_of_clients": own_cores,
        "cores_of_workers": cores,
        "cores_of_workers_at_peak": peak_cores,
        "goodput_of_peak_by_cores": len(good) / (ended - began - 2) / cores / (peak / peak_cores),
        "livez": len(alive_ms),
        "livez_failed": failed(probes.rows, ("livez",)),
        "livez_p99_ms": sorted(alive_ms)[int(0.99 * len(alive_ms))],
        "livez_worst_ms": max(alive_ms),
        "quiet_p99_ms": before["p99_ms"],
        "recovery_s": _recovery(after, stopped, 2 * before["p99_ms"]),
        "failed_before": failed(calm.rows),
        "failed_after": failed(after.rows),
    }
    excess.rows += calm.rows + after.rows
    return figures, excess


def _cpu_s(running: RunningService) -> float:
    """CPU seconds that the workers have used."""
    times = [worker.cpu_times() for worker in running.workers()]
    return sum(each.user + each.system for each in times)


def _recovery(after: Traffic, since: float, bearable_ms: float) -> float:
    """Seconds until at most two requests per quarter of a second fail or are slow."""
    bad = [
        row.due
        for row in after.rows
        if row.status != 200 or 1000 * (row.done - row.due) > bearable_ms
    ]
    quarters = [int(4 * (due - since)) for due in bad]
    bad_quarters = [each for each in set(quarters) if quarters.count(each) > 2]
    return (max(bad_quarters) + 1) / 4 if bad_quarters else 0.0


def impatient_clients(seconds: int = 20) -> tuple[dict[str, Any], None]:
    """Ten times the connections that saturate; a refused client sends again at once."""
    figures: dict[str, Any] = {"seconds": seconds}
    with paths_of_two() as (paths, image), service(paths) as running:
        figures |= asyncio.run(_impatient("w1", running, image, 32, seconds))
    with paths_of_two() as (paths, _):
        image = publish_slow(paths)
        with running_service(paths.root, SLOW_MODEL) as running:
            figures |= asyncio.run(_impatient("w2", running, image, PEAK_CONNECTIONS, seconds))
    return figures, None


async def _impatient(
    name: str, running: RunningService, image: bytes, connections: int, seconds: int
) -> dict[str, Any]:
    """Answers 200 per second, and per CPU second of workers, with 1 and 10 times the clients."""
    figures: dict[str, Any] = {}
    for times in (1, TIMES):
        traffic = Traffic(running.port, in_turn([post(image)]), 0, times * connections)
        async with traffic.running():
            await asyncio.sleep(2)
            used, began = _cpu_s(running), time.perf_counter()
            await asyncio.sleep(seconds)
            used, ended = _cpu_s(running) - used, time.perf_counter()
        rows = between(traffic.rows, began, ended, by="done")
        good = sum(row.status == 200 for row in rows)
        of = f"{name}_{times * connections}"
        figures |= {
            f"{of}_ok_per_s": good / (ended - began),
            f"{of}_ok_per_cpu_s": good / used,
            f"{of}_refused_503": sum(row.status == 503 for row in rows),
            f"{of}_failed": sum(row.status not in (200, 503) for row in rows),
        }
    one, ten = (figures[f"{name}_{times * connections}_ok_per_cpu_s"] for times in (1, TIMES))
    return {**figures, f"{name}_goodput_of_peak_per_cpu": ten / one}


def slow_clients(seconds: int = 300) -> tuple[dict[str, Any], Traffic]:
    """500 connections send or read a byte at a time, without a proxy, next to honest clients."""
    with paths_of_two() as (paths, image), service(paths) as running:
        return asyncio.run(_slow_clients(running, image, seconds))


async def _slow_clients(
    running: RunningService, image: bytes, seconds: int
) -> tuple[dict[str, Any], Traffic]:
    ask = honest(running.port, image)
    rate = 0.5 * await capacity(running.port, ask)
    longer = post(image + bytes(100_000), expected=ask.expected)
    traffic = Traffic(running.port, in_turn([ask] * 20 + [longer]), rate)
    closed: list[str] = []
    async with traffic.running():
        await asyncio.sleep(5)
        traffic.fault("500 slow clients")
        began = time.perf_counter()
        until = began + seconds
        kinds = (_slow_head, _slow_body, _slow_reader, _silent)
        clients = [
            asyncio.ensure_future(_again(kinds[n % len(kinds)], running.port, until, closed))
            for n in range(SLOW)
        ]
        await asyncio.gather(*clients)
        traffic.fault("slow clients gone")
        await asyncio.sleep(2)
    quiet = summary([row for row in traffic.rows if row.due < began])
    figures = {
        "slow_connections": SLOW,
        "seconds": seconds,
        "closed_by_us": len(closed),
        "rate": rate,
        **summary(traffic.rows),
        "failed": failed(traffic.rows),
        "quiet_p99_ms": quiet["p99_ms"],
        "threads": sum(worker.num_threads() for worker in running.workers()),
    }
    return figures, traffic


async def _again(kind: Any, port: int, until: float, closed: list[str]) -> None:
    """One slow client, which connects again when the service closes its connection."""
    await asyncio.sleep(random.uniform(0, 2))
    while time.perf_counter() < until:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        except OSError:
            await asyncio.sleep(0.5)
            continue
        try:
            await kind(reader, writer, until)
        except OSError:
            closed.append(kind.__name__)
        finally:
            writer.close()


async def _slow_head(reader: Any, writer: Any, until: float) -> None:
    for byte in b"POST /v1/classify HTTP/1.1\r\nX: " + b"y" * 10_000:
        await _step(reader, writer, bytes([byte]), until)


async def _slow_body(reader: Any, writer: Any, until: float) -> None:
    writer.write(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
    for _ in range(10_000):
        await _step(reader, writer, b"z", until)


async def _slow_reader(reader: Any, writer: Any, until: float) -> None:
    """Send a hundred requests and read none of the answers."""
    writer.transport.pause_reading()
    for _ in range(100):
        writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
    while time.perf_counter() < until:
        await asyncio.sleep(1)
        if writer.transport.is_closing():
            raise OSError


async def _silent(reader: Any, writer: Any, until: float) -> None:
    while time.perf_counter() < until:
        await asyncio.sleep(1)
        if reader.at_eof():
            raise OSError


async def _step(reader: Any, writer: Any, data: bytes, until: float) -> None:
    if time.perf_counter() > until:
        return
    writer.write(data)
    await writer.drain()
    await asyncio.sleep(1)
    if reader.at_eof() or writer.transport.is_closing():
        raise OSError
