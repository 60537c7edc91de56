"""Scenario 4: a fault proxy makes the registry refuse, hang, slow down, cut and flap."""

import asyncio
import subprocess
import sys
import time
from typing import Any

import aiohttp

from benchmarks.chaos.proxy import Fault, FaultProxy
from benchmarks.chaos.stack import MODEL, paths_of_two, service, wait_for_port
from benchmarks.common import RunningService, free_port
from benchmarks.traffic import Traffic, failed, honest, in_turn, summary
from registry.core.paths import Paths

RATE = 300.0
FAULTS = (Fault.REFUSED, Fault.HUNG, Fault.SLOW, Fault.CUT, Fault.FLAPPING)
CALM_S = 8.0
RECOVERY_S = 120.0


def registry_faults(seconds: int = 600) -> tuple[dict[str, Any], Traffic]:
    """The registry refuses, hangs, slows, cuts and flaps while the service answers requests."""
    with paths_of_two() as (paths, image):
        server_port = free_port()
        server = start_mlflow(paths, server_port)
        try:
            return asyncio.run(_registry_faults(paths, image, server_port, seconds))
        finally:
            server.terminate()
            server.wait(20)


def start_mlflow(paths: Paths, port: int) -> "subprocess.Popen[bytes]":
    """Start an MLflow server with the database and artefacts of ``paths``."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--allowed-hosts", "*"]
    command += ["--backend-store-uri", paths.tracking_uri, "--serve-artifacts"]
    command += ["--artifacts-destination", paths.artifacts.as_uri()]
    log = (paths.root / "mlflow.log").open("ab")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    wait_for_port(port, 90)
    return process


async def _registry_faults(
    paths: Paths, image: bytes, server_port: int, seconds: int
) -> tuple[dict[str, Any], Traffic]:
    loop = asyncio.get_running_loop()
    proxy = FaultProxy(server_port)
    await proxy.start()
    uri = f"http://127.0.0.1:{proxy.port}"

    def start() -> Any:
        manager = service(paths, pull=True, MLFLOW_TRACKING_URI=uri)
        return manager, manager.__enter__()

    manager, running = await loop.run_in_executor(None, start)
    traffic = Traffic(running.port, in_turn([honest(running.port, image)]), RATE)
    figures: dict[str, Any] = {}
    cold_s: list[float] = []
    began = time.perf_counter()
    try:
        async with traffic.running():
            await _until_fresh(running.port)
            for fault in FAULTS:
                traffic.fault(fault.name)
                proxy.become(fault)
                name = fault.name.lower()
                until = time.perf_counter() + seconds / len(FAULTS)
                cold_s.append(await loop.run_in_executor(None, _cold_start, paths, uri))
                await asyncio.sleep(max(0.0, until - time.perf_counter()))
                figures[f"{name}_stale"] = (await _ready(running.port))["models"][0]["stale"]
                traffic.fault("NONE")
                proxy.become(Fault.NONE)
                figures[f"{name}_recovered_s"] = await _until_fresh(running.port)
                await asyncio.sleep(CALM_S)
    finally:
        await loop.run_in_executor(None, manager.__exit__, None, None, None)
        await proxy.stop()
    return {
        "seconds": time.perf_counter() - began,
        **summary(traffic.rows),
        "failed": failed(traffic.rows),
        "cold_starts": len(cold_s),
        "cold_start_worst_s": max(cold_s),
        **figures,
    }, traffic


def _cold_start(paths: Paths, uri: str) -> float:
    """Seconds until another service with the same disk and registry is ready."""
    other = RunningService(paths.root, MODEL, 2, True, MLFLOW_TRACKING_URI=uri)
    try:
        return other.start_to_ready_s
    finally:
        other.stop()


async def _ready(port: int) -> Any:
    url = f"http://127.0.0.1:{port}/readyz"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return await answer.json()


async def _until_fresh(port: int) -> float:
    """Wait until the puller has agreed with the registry in the last 5 s; returns the seconds."""
    began = time.perf_counter()
    while time.perf_counter() - began < RECOVERY_S:
        (model,) = (await _ready(port))["models"]
        if model["registry_age_s"] is not None and model["registry_age_s"] < 5:
            return round(time.perf_counter() - began, 1)
        await asyncio.sleep(0.25)
    return float("inf")
