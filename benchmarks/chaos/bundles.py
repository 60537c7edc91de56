"""Scenario 8: malicious and broken bundles are deployed while the service answers requests."""

import asyncio
import json
import random
import shutil
import time
import urllib.request
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.chaos.stack import paths_of_two, service
from benchmarks.common import RunningService
from benchmarks.traffic import Traffic, failed, honest, in_turn, summary
from registry.core.paths import Paths
from registry.delivery.deployment import (
    DeployedVersion,
    read_deployment,
    version_folder,
    write_deployment,
)
from registry.model.bundle import open_bundle
from registry.model.refs import ModelRef
from tests.hostile_bundles import HOSTILE_BUNDLES, as_published

DIGITS = ModelRef("digits", alias="champion")
RATE = 300.0
WAIT_TIMEOUT_S = 20.0


def hostile_bundles(flips: int = 1000) -> tuple[dict[str, Any], Traffic]:
    """Malicious and broken bundles, and ones with a flipped bit, are deployed under load."""
    # Choosing a plan for each of a thousand versions would take a day.
    with paths_of_two() as (paths, image), service(paths, plan="torch-eager") as running:
        return asyncio.run(_hostile_bundles(paths, running, image, flips))


async def _hostile_bundles(
    paths: Paths, running: RunningService, image: bytes, flips: int
) -> tuple[dict[str, Any], Traffic]:
    loop = asyncio.get_running_loop()
    traffic = Traffic(running.port, in_turn([honest(running.port, image)]), RATE)
    good = paths.root / "good"
    deployment = read_deployment(paths.models, DIGITS)
    assert deployment is not None
    (served,) = deployment.versions
    shutil.copytree(version_folder(paths.models, "digits", served.version), good)
    async with traffic.running():
        await asyncio.sleep(2)
        figures = await loop.run_in_executor(None, _deploy_all, paths, running, good, flips)
    versions = {row.answer.lower().partition(b"x-model-version: ")[2][:3] for row in traffic.rows}
    figures |= {
        **summary(traffic.rows),
        "failed": failed(traffic.rows),
        "answered_by_another": len([v for v in versions if v.strip() != b"%d" % served.version]),
    }
    return figures, traffic


def _deploy_all(paths: Paths, running: RunningService, good: Path, flips: int) -> dict[str, Any]:
    """Deploy one bundle after the other, each as a new version, and wait until it is refused."""
    number, activated, markers, unrefused = 1000, [], [], []
    dice = random.Random(0)
    names = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file())
    digest = open_bundle(good).manifest_sha256
    jobs: list[str | None] = [*HOSTILE_BUNDLES, *[None] * flips]
    for name in tqdm(jobs, desc="bundles", unit="bundle", disable=None):
        number += 1
        folder = version_folder(paths.models, "digits", number)
        shutil.copytree(good, folder)
        marker = paths.root / f"marker-{number}"
        deployed_digest = digest
        if name is None:
            file = folder / dice.choice(names)
            data = bytearray(file.read_bytes())
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            file.write_bytes(data)
        else:
            HOSTILE_BUNDLES[name](open_bundle(folder), marker)
            # Half of them are from an attacker who can also change the digest in the registry. Two
            # kinds are harmless then, may serve, and are left out of that half:
            # tests/service/test_hostile_bundles.py.
            is_digest_changed = number % 2 and name not in (
                "labels are swapped",
                "calibration is an array of objects",
            )
            if is_digest_changed:
                deployed_digest = as_published(open_bundle_or(folder, good))
        new = DeployedVersion(version=number, manifest_sha256=deployed_digest, alias="champion")
        write_deployment(paths.models, DIGITS, (new,))
        outcome = _outcome(running, number)
        if outcome == "activated":
            activated.append(name or "a flipped bit")
        elif outcome == "silent":
            unrefused.append(name or "a flipped bit")
        if marker.exists():
            markers.append(name)
        shutil.rmtree(folder)
    return {
        "bundles": len(jobs),
        "flips": flips,
        "markers": len(markers),
        "activations": len(activated),
        "activated": activated[:10],
        "not_refused_in_time": unrefused[:10],
    }


def open_bundle_or(folder: Path, good: Path) -> Any:
    """The good bundle with ``folder`` in its place, to compute the digest of a changed bundle."""
    bundle = open_bundle(good)
    bundle.folder = folder
    return bundle


def _outcome(running: RunningService, number: int) -> str:
    """What the workers did with version ``number``: "refused", "activated", or "silent" so far."""
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while time.monotonic() < deadline:
        url = f"http://127.0.0.1:{running.port}/v1/models/digits"
        with urllib.request.urlopen(url, timeout=10) as answer:
            workers = json.loads(answer.read())["workers"]
        if any(worker["version"] == number for worker in workers):
            return "activated"
        if all(worker["refused"] == number or _names(worker, number) for worker in workers):
            return "refused"
        time.sleep(0.02)
    return "silent"


def _names(worker: dict[str, Any], number: int) -> bool:
    return f"/versions/{number}/" in (worker["error"] or "")
