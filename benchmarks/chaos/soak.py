"""Scenario 12: half an hour of requests and fifty swaps; does memory use grow?"""

import asyncio
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.chaos.stack import paths_of_two, service
from benchmarks.common import RunningService
from benchmarks.traffic import Ask, Traffic, failed, get, honest, in_turn, post, summary
from benchmarks.two_versions import run
from registry.core.paths import Paths
from tests.hostile_pictures import HOSTILE

RATE = 500.0
SWAPS = 50
SAMPLE_S = 2.0
WARM_UP = 0.25  # of the time; by then every thread has decoded the largest picture once


def soak(seconds: int = 1800) -> tuple[dict[str, Any], Traffic]:
    """Half an hour of small, large and refused pictures, while two versions swap fifty times."""
    with paths_of_two() as (paths, image):
        run(paths, "registry", "plan", "digits/2")
        with service(paths, pull=True, CONVOY_KEEP_WARM_S="0") as running:
            return asyncio.run(_soak(paths, running, image, seconds))


async def _soak(
    paths: Paths, running: RunningService, image: bytes, seconds: int
) -> tuple[dict[str, Any], Traffic]:
    names = ("jpeg of 5,000 scans", "jpeg of one byte", "a gif", "png of 30 packed texts")
    others = [post(HOSTILE[name](), kind="other") for name in names]
    pages = [get(path, "other") for path in ("/readyz", "/metrics", "/v1/models", "/docs")]
    asks: list[Ask] = [honest(running.port, image)] * 92 + others + pages
    traffic = Traffic(running.port, in_turn(asks), RATE)
    samples: list[tuple[float, list[int], int, int]] = []
    workers = running.workers()
    swapping = asyncio.ensure_future(_swap(paths, traffic, seconds))
    async with traffic.running():
        began = time.perf_counter()
        with tqdm(total=seconds, desc="soak", unit="s", disable=None) as bar:
            while (now := time.perf_counter() - began) < seconds:
                samples.append(
                    (
                        now,
                        [worker.memory_info().rss for worker in workers],
                        sum(worker.num_threads() for worker in workers),
                        sum(worker.num_fds() for worker in workers),
                    )
                )
                bar.n = int(now)
                bar.refresh()
                await asyncio.sleep(SAMPLE_S)
        swaps = await swapping
    settled = [sample for sample in samples if sample[0] > WARM_UP * seconds]
    slopes = [
        _slope([(at, rss[n]) for at, rss, _, _ in settled], seconds / SWAPS)
        for n in range(len(workers))
    ]
    figures = {
        "seconds": seconds,
        "swaps": swaps,
        **summary(traffic.rows),
        "failed": failed(traffic.rows),
        "others": sum(row.kind == "other" for row in traffic.rows),
        "others_5xx_or_lost": sum(
            row.status >= 500 or row.status <= 0 for row in traffic.rows if row.kind == "other"
        ),
        "rss_slope_mb_per_h": [round(slope, 2) for slope, _ in slopes],
        # The slope minus two standard errors: growth below that is not proved.
        "rss_slope_shown_mb_per_h": max(round(slope - 2 * error, 2) for slope, error in slopes),
        "rss_slope_error_mb_per_h": [round(error, 2) for _, error in slopes],
        "rss_mb": [[round(each / 2**20, 1) for each in rss] for _, rss, _, _ in samples],
        "rss_mb_first_settled_last": [
            [round(sample[1][n] / 2**20, 1) for sample in (samples[0], settled[0], samples[-1])]
            for n in range(len(workers))
        ],
        "threads_settled_last": [settled[0][2], samples[-1][2]],
        "descriptors_settled_last": [settled[0][3], samples[-1][3]],
        "same_workers": [worker.pid for worker in workers]
        == [worker.pid for worker in running.workers()],
    }
    return figures, traffic


def _slope(samples: list[tuple[float, int]], swap_s: float) -> tuple[float, float]:
    """Growth of the lowest memory use between swaps, in MiB per hour, and its standard error.

    While a worker loads a version, it holds both versions and the memory for loading. It frees
    these again, so they are not a leak; memory that leaks also remains at the lowest point.
    """
    least: dict[int, tuple[float, int]] = {}
    for at, rss in samples:
        turn = int(at / swap_s)
        least[turn] = min(least.get(turn, (at, rss)), (at, rss), key=lambda each: each[1])
    at_h = np.array([at for at, _ in least.values()]) / 3600
    mb = np.array([rss for _, rss in least.values()]) / 2**20
    (slope, _), covariance = np.polyfit(at_h, mb, 1, cov=True)
    return float(slope), float(np.sqrt(covariance[0, 0]))


async def _swap(paths: Paths, traffic: Traffic, seconds: int) -> int:
    """Promote the two versions in turn, at equal intervals; returns the number of swaps."""
    loop = asyncio.get_running_loop()
    for number in range(SWAPS):
        await asyncio.sleep(0.9 * seconds / SWAPS)
        traffic.fault("swap")
        version = str(2 - number % 2)
        arguments = ("registry", "promote", "digits", version, "--force", "--reason", "soak")
        await loop.run_in_executor(None, run, paths, *arguments)
    return SWAPS
