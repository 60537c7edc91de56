"""One step of choosing a plan, in a process of its own: ``python -m registry.plans.trial``.

An engine that does not fit the machine may take its process down; this one is there to be taken.
``run_trials`` starts it; it writes one JSON line for each plan that it finished to what was its
standard output; everything that libraries print goes to standard error.
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

from registry.bundle import Bundle, open_bundle
from registry.classifier import Classifier, replay_golden
from registry.plans.plan import Source, find_plan
from registry.processes import end_with_parent

log = logging.getLogger(__name__)

BATCHES = (1, 8, 32)
HELDOUT_PIXELS, HELDOUT_LABELS = "heldout-pixels.npy", "heldout-labels.npy"
LIMIT_S = 300  # for a plan to be built, or to be tried
KILLED = "its process was killed from outside, perhaps for want of memory"
WINDOW_S = 0.3
LEAST_RUNS = 3


Step = Literal["build", "try", "score"]


class Job(Struct, frozen=True, kw_only=True):
    """What a trial process is told: which plans of which bundle to build, to try or to score."""

    step: Step
    plans: tuple[str, ...]
    bundle: str
    manifest_sha256: str
    device: str
    threads: int | None
    folder: str
    """Artefacts of a plan lie in the folder of its name under this one, held-out pictures in it."""
    limit_s: int
    """For each plan."""


class Finding(Struct, frozen=True, kw_only=True):
    """What came out for one plan; ``reason`` says why not, or is None."""

    plan: str
    reason: str | None = None
    build_s: float = 0.0
    max_difference: float | None = None
    batch_ms: dict[int, float] = {}
    peak_mb: float | None = None
    accuracy: float | None = None


def run_trials(
    step: Step,
    names: list[str],
    bundle: Bundle,
    work: Path,
    device: str,
    threads: int | None = None,
    limit_s: int = LIMIT_S,
) -> list[Finding]:
    """One step for each plan of ``names``, in order; one in which the process dies is rejected.

    Args:
        step: what to do; a plan is tried, and scored, after it was built in the same ``work``.
        names: of plans, which run in one process after the other, as long as it lives.
        bundle: whose network.
        work: the folder of the plans' artefacts, one for each, and of held-out pictures.
        device: ``cpu`` or ``cuda:N``.
        threads: of one forward pass; None leaves the engine's own choice.
        limit_s: for each plan.
    """
    findings: list[Finding] = []
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    while remaining := names[len(findings) :]:
        job = Job(
            step=step,
            plans=tuple(remaining),
            bundle=str(bundle.folder),
            manifest_sha256=bundle.manifest_sha256,
            device=device,
            threads=threads,
            folder=str(work),
            limit_s=limit_s,
        )
        found, reason = _run(job, environment)
        findings += found
        if len(found) < len(remaining):
            findings.append(Finding(plan=remaining[len(found)], reason=reason))
    return findings


def _run(job: Job, environment: dict[str, str]) -> tuple[list[Finding], str]:
    """What a trial process found, and, if that is not all, how it ended."""
    command = [sys.executable, "-m", "registry.plans.trial", msgspec.json.encode(job).decode()]
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdout=answers, stderr=said, env=environment, start_new_session=True
        )
        hangs = False
        try:
            process.wait(job.limit_s * len(job.plans) + 30)
        except subprocess.TimeoutExpired:
            hangs = True
            log.warning("the trial of %s hangs", ", ".join(job.plans))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # compilers that it left behind, too
        process.wait()
        answers.seek(0)
        found = [msgspec.json.decode(line, type=Finding) for line in answers]
        said.seek(0)
        last = said.read().decode(errors="replace").strip().splitlines()[-1:]
    if process.returncode == -signal.SIGKILL and not hangs:
        return found, KILLED
    if hangs or process.returncode == -signal.SIGALRM:
        return found, f"it took more than {job.limit_s} s to {job.step}"
    return found, f"its process ended with {process.returncode} {' '.join(last)[:300]}".strip()


def main() -> int:
    end_with_parent(signal.SIGKILL)  # nobody would read the answer, and others time plans here
    job = msgspec.json.decode(sys.argv[1], type=Job)
    if job.device == "cpu":  # on a GPU only torch's own plans run, and CUDA maps far more
        _limit_memory()
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    bundle = open_bundle(Path(job.bundle), job.manifest_sha256)
    source = Source(bundle, job.device, job.threads)
    step = {"build": _build, "try": _try, "score": _score}[job.step]
    for name in job.plans:
        signal.alarm(job.limit_s)
        try:
            finding = step(name, source, job)
        except Exception as error:  # noqa: BLE001 - whatever an engine raises, the plan is not for here
            text = str(error).strip().splitlines() or [""]
            finding = Finding(plan=name, reason=f"{type(error).__name__}: {text[0][:300]}")
        answers.write(msgspec.json.encode(finding) + b"\n")
    return 0


def _limit_memory() -> None:
    """To half of the machine's, or of its container's by cgroup v2.

    A graph may ask for any amount, and others live here, too.
    """
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # "max": this container has no limit of its own
        most = min(most, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    resource.setrlimit(resource.RLIMIT_DATA, (most // 2, most // 2))


def _build(name: str, source: Source, job: Job) -> Finding:
    folder = Path(job.folder) / name
    folder.mkdir(parents=True)
    started = time.perf_counter()
    find_plan(name).build(source, folder)
    return Finding(plan=name, build_s=time.perf_counter() - started)


def _try(name: str, source: Source, job: Job) -> Finding:
    """Prove the plan as serving does, time it, and note what memory a worker with it needs."""
    classifier = _load(name, source, job)
    difference = replay_golden(source.bundle, classifier, find_plan(name))
    batch_ms = {size: time_batch(classifier, source.bundle, size) for size in BATCHES}
    return Finding(plan=name, max_difference=difference, batch_ms=batch_ms, peak_mb=peak_mb())


def _score(name: str, source: Source, job: Job) -> Finding:
    """Measure the plan's accuracy on the held-out pictures that lie in the job's folder."""
    pixels = np.load(Path(job.folder) / HELDOUT_PIXELS, mmap_mode="c")  # torch wants writable ones
    labels = np.load(Path(job.folder) / HELDOUT_LABELS)
    predicted = _load(name, source, job).classify(pixels).argmax(axis=1)
    return Finding(plan=name, accuracy=float((predicted == labels).mean()))


def _load(name: str, source: Source, job: Job) -> Classifier:
    folder = Path(job.folder) / name
    run = find_plan(name).load(source, lambda file: (folder / file).read_bytes())
    return Classifier(run, name, job.device)


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
    """The most memory that this process ever held; None where the system does not say.

    Not getrusage's figure, which a process inherits from the one that started it.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 / 1e6 if found else None


if __name__ == "__main__":
    sys.exit(main())
