"""Times the forward passes of two versions on this machine, in a separate process.

The passes alternate between the versions, so other load on the machine affects both alike. Each
version runs with the plan that would serve it here; if no plan was chosen yet, the process chooses
and remembers one first. Like a benchmark, it runs in a process of its own. The process writes one
line of JSON to its standard output.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from registry.core.devices import choose_device
from registry.core.errors import BundleInvalid, ConvoyError
from registry.core.process_lifetime import end_with_parent
from registry.model.bundle import Bundle, open_bundle
from registry.model.classifier import Classifier
from registry.model.plans.base import catalogue

BATCHES = (1, 8)
ROUNDS = 31
TIMEOUT_S = 900.0


class ComparisonJob(Struct, frozen=True, kw_only=True):
    """Which bundles to time and how to run them; ``device`` and ``plan`` are as in the settings."""

    bundles: tuple[tuple[str, str], tuple[str, str]]
    plans_folder: str
    device: str
    plan: str
    threads: int


class LatencyComparison(Struct, frozen=True, kw_only=True):
    """The median milliseconds of a forward pass of each version, by batch size."""

    device: str
    plans: tuple[str, str]
    champion_ms: dict[int, float]
    challenger_ms: dict[int, float]


def compare_latency(
    champion: Bundle, challenger: Bundle, plans_folder: Path, device: str, plan: str, threads: int
) -> LatencyComparison | None:
    """The forward times of both versions; None if no engine is installed to run them.

    Raises:
        BundleInvalid: a version cannot be run here; the text says which one and why.
    """
    if all(each.unsupported("cpu") for each in catalogue().values()):
        return None
    first, second = (
        (str(bundle.folder.resolve()), bundle.manifest_sha256) for bundle in (champion, challenger)
    )
    job = ComparisonJob(
        bundles=(first, second),
        plans_folder=str(plans_folder),
        device=device,
        plan=plan,
        threads=threads,
    )
    command = [
        sys.executable,
        "-m",
        "registry.promotion.latency_comparison",
        msgspec.json.encode(job).decode(),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BundleInvalid(
            f"timing the forward passes took longer than {TIMEOUT_S:g} s"
        ) from error
    try:
        return msgspec.json.decode(done.stdout, type=LatencyComparison)
    except msgspec.MsgspecError as error:
        text = done.stdout.decode(errors="replace").strip()
        why = text or f"the timing process ended with status {done.returncode}"
        raise BundleInvalid(f"the forward passes cannot be timed: {why}") from error


def main() -> int:
    """Time the ``ComparisonJob`` in the first argument, and write the result to standard output.

    Returns:
        The exit status: 0 after a ``LatencyComparison`` as JSON, 2 after the text of an error.
    """
    end_with_parent()
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries may print: send that to standard error
    job = msgspec.json.decode(sys.argv[1], type=ComparisonJob)
    try:
        answer.write(msgspec.json.encode(_run(job)))
    except ConvoyError as error:
        answer.write(str(error).encode())
        return 2
    finally:
        answer.close()
    return 0


def _run(job: ComparisonJob) -> LatencyComparison:
    from registry.model.plans.planner import Planner

    device = choose_device(job.device)
    planner = Planner(Path(job.plans_folder), device, job.threads, job.plan)
    bundles = [open_bundle(Path(folder), sha256) for folder, sha256 in job.bundles]
    both: list[Classifier] = []
    for role, bundle in zip(("champion", "challenger"), bundles, strict=True):
        try:
            planner.choose(bundle)
            both.append(planner.load(bundle))
        except ConvoyError as error:
            raise BundleInvalid(f"the {role}: {error}") from error
    taken: dict[tuple[int, int], list[float]] = {}
    random = np.random.default_rng(0)
    for size in BATCHES:
        pixels = [
            random.integers(0, 256, (size, *bundle.manifest.preprocess.shape), dtype=np.uint8)
            for bundle in bundles
        ]
        for _ in range(ROUNDS):
            for place, classifier in enumerate(both):
                began = time.perf_counter()
                classifier.classify(pixels[place])
                taken.setdefault((place, size), []).append(1000 * (time.perf_counter() - began))
    medians = [
        {size: statistics.median(taken[place, size]) for size in BATCHES} for place in (0, 1)
    ]
    return LatencyComparison(
        device=both[0].device,
        plans=(both[0].plan, both[1].plan),
        champion_ms=medians[0],
        challenger_ms=medians[1],
    )


if __name__ == "__main__":
    sys.exit(main())
