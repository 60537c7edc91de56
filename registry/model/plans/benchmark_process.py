"""Benchmarks one plan in a process of its own, which ``run_benchmark`` starts.

An engine that does not suit the machine may crash its process; it must not crash a worker. The
process writes its result as JSON to its original standard output. The prints of libraries go to
standard error.
"""

import contextlib
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from msgspec import Struct

from registry.core.process_lifetime import end_with_parent
from registry.model.bundle import Bundle, open_bundle
from registry.model.classifier import Classifier, replay_golden
from registry.model.plans.base import PlanContext, find_plan

log = logging.getLogger(__name__)

BATCHES = (1, 8, 32)
HELDOUT_PIXELS, HELDOUT_LABELS = "heldout-pixels.npy", "heldout-labels.npy"
LIMIT_S = 300  # for one benchmark
KILLED = "its process was killed from outside, perhaps because memory ran out"
WINDOW_S = 0.3
LEAST_RUNS = 3


Step = Literal["try", "score"]


class Job(Struct, frozen=True, kw_only=True):
    """The task of a benchmark process: which plan to run on which bundle. See ``run_benchmark``."""

    step: Step
    plan: str
    bundle: str
    manifest_sha256: str
    device: str
    threads: int | None
    heldout: str | None
    """The folder of the held-out pictures; only the step ``score`` reads them."""
    limit_s: int


class PlanResult(Struct, frozen=True, kw_only=True):
    """The result of one plan's benchmark. ``reason`` says why it was rejected; None if it was not.

    ``max_difference`` is the largest difference to a published probability, ``batch_ms`` maps a
    batch size to its median milliseconds, ``peak_mb`` is the memory of the process in MB, and
    ``accuracy`` is that on the held-out pictures.
    """

    plan: str
    reason: str | None = None
    max_difference: float | None = None
    batch_ms: dict[int, float] = {}
    peak_mb: float | None = None
    accuracy: float | None = None


def run_benchmark(
    step: Step,
    plan: str,
    bundle: Bundle,
    device: str,
    threads: int | None = None,
    heldout: Path | None = None,
    limit_s: int = LIMIT_S,
) -> PlanResult:
    """The result of ``plan`` from a process of its own. If that process dies, the plan is rejected.

    Args:
        step: ``try`` proves and times the plan, ``score`` measures its held-out accuracy.
        plan: the plan's name.
        bundle: the version whose network runs.
        device: ``cpu`` or ``cuda:N``.
        threads: those of one forward pass; None lets the engine choose.
        heldout: for ``score``, the folder of the held-out pictures.
        limit_s: the process is killed after so many seconds.
    """
    job = Job(
        step=step,
        plan=plan,
        bundle=str(bundle.folder),
        manifest_sha256=bundle.manifest_sha256,
        device=device,
        threads=threads,
        heldout=str(heldout) if heldout else None,
        limit_s=limit_s,
    )
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [
        sys.executable,
        "-m",
        "registry.model.plans.benchmark_process",
        msgspec.json.encode(job).decode(),
    ]
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdout=answer, stderr=errors, env=environment, start_new_session=True
        )
        hangs = False
        try:
            process.wait(limit_s + 30)
        except subprocess.TimeoutExpired:
            hangs = True
            log.warning("the benchmark of %s hangs; its process is killed", plan)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with all processes that it started
        process.wait()
        answer.seek(0)
        if found := answer.read():
            return msgspec.json.decode(found, type=PlanResult)
        errors.seek(0)
        last_line = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    if process.returncode == -signal.SIGKILL and not hangs:
        reason = KILLED
    elif hangs or process.returncode == -signal.SIGALRM:
        reason = f"it took more than {limit_s} s to {step}"
    else:
        reason = f"its process ended with {process.returncode} {' '.join(last_line)[:300]}".strip()
    return PlanResult(plan=plan, reason=reason)


def main() -> int:
    """Run the ``Job`` in the first argument, and write its ``PlanResult`` as JSON."""
    # Without its parent, the result is lost, and the process would disturb other benchmarks.
    end_with_parent(signal.SIGKILL)
    job = msgspec.json.decode(sys.argv[1], type=Job)
    if job.device == "cpu":  # on a GPU only torch's own plans run, and CUDA maps far more memory
        _limit_memory()
    answer = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    bundle = open_bundle(Path(job.bundle), job.manifest_sha256)
    context = PlanContext(bundle, job.device, job.threads)
    signal.alarm(job.limit_s)
    try:
        result = _try(context, job) if job.step == "try" else _score(context, job)
    except Exception as error:  # noqa: BLE001 - an engine may raise anything; its plan is rejected
        text = str(error).strip().splitlines() or [""]
        result = PlanResult(plan=job.plan, reason=f"{type(error).__name__}: {text[0][:300]}")
    answer.write(msgspec.json.encode(result))
    return 0


def _limit_memory() -> None:
    """Limit this process to half of the memory of the machine, or of its container (cgroup v2).

    A graph may ask for any amount, and the machine runs other processes, too.
    """
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # "max": this container has no limit of its own
        most = min(most, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    resource.setrlimit(resource.RLIMIT_DATA, (most // 2, most // 2))


def _try(context: PlanContext, job: Job) -> PlanResult:
    """Prove the plan as serving does, time it, and measure the memory that a worker needs."""
    classifier = _load(context, job)
    difference = replay_golden(context.bundle, classifier, find_plan(job.plan))
    batch_ms = {size: time_batch(classifier, context.bundle, size) for size in BATCHES}
    return PlanResult(
        plan=job.plan, max_difference=difference, batch_ms=batch_ms, peak_mb=peak_mb()
    )


def _score(context: PlanContext, job: Job) -> PlanResult:
    """Measure the plan's accuracy on the held-out pictures."""
    folder = Path(str(job.heldout))
    pixels = np.load(folder / HELDOUT_PIXELS, mmap_mode="c")  # torch needs writable arrays
    labels = np.load(folder / HELDOUT_LABELS)
    predicted = _load(context, job).classify(pixels).argmax(axis=1)
    return PlanResult(plan=job.plan, accuracy=float((predicted == labels).mean()))


def _load(context: PlanContext, job: Job) -> Classifier:
    return Classifier(find_plan(job.plan).load(context), job.plan, job.device)


def time_batch(classifier: Classifier, bundle: Bundle, size: int) -> float:
    """Median milliseconds of a forward pass over ``size`` images."""
    shape = bundle.manifest.preprocess.shape
    pixels = np.random.default_rng(0).integers(0, 256, (size, *shape), dtype=np.uint8)
    classifier.classify(pixels)
    runs_ms: list[float] = []
    until = time.perf_counter() + WINDOW_S
    while len(runs_ms) < LEAST_RUNS or time.perf_counter() < until:
        started = time.perf_counter()
        classifier.classify(pixels)
        runs_ms.append((time.perf_counter() - started) * 1000)
    return float(np.median(runs_ms))


def peak_mb() -> float | None:
    """The peak memory of this process in MB; None if the system does not report it.

    It is not read from ``getrusage``, whose figure a process inherits from its parent.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 / 1e6 if found else None


if __name__ == "__main__":
    sys.exit(main())
