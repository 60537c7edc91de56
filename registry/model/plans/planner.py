"""Finds the fastest plan for a version on this machine, and remembers it in a cache.

Each candidate is proved on the golden images and timed in a process of its own
(``registry.model.plans.benchmark_process``). So an engine that crashes on this machine is a
rejected plan, not a dead worker, and the measured memory is what a worker with that plan needs.
Imports neither torch nor any engine.

The cache holds names of plans, and nothing that an engine loads. It is not trusted: a remembered
plan must still be a candidate for the version, and is proved again on the golden images when it
loads.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import math
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean

import msgspec
from msgspec import Struct

from registry.core.devices import describe_machine
from registry.core.errors import BundleInvalid, DeviceUnavailable, PlanUndecided
from registry.core.files import write_atomically
from registry.core.names import sha256_hex
from registry.model.bundle import Bundle
from registry.model.classifier import Classifier, load_classifier
from registry.model.manifest import ListedNetwork, Manifest
from registry.model.plans.base import Plan, PlanContext, catalogue, find_plan
from registry.model.plans.benchmark_process import KILLED, PlanResult, run_benchmark
from registry.model.plans.torch_eager import EAGER

log = logging.getLogger(__name__)

AUTO = "auto"
# Held while plans are benchmarked. Each write takes the lock of ``registry.core.files`` besides.
CHOOSING = "choosing.lock"
# Increase it when a change of the code may choose another plan for the same cache key.
CACHE_SCHEMA = 3
# The first that is installed scores versions that are graphs.
GRAPH_REFERENCES = ("onnxruntime-fp32", "openvino-fp32")
SELECTION, REFUSED = ".json", ".refused"
CACHE_ENTRIES = 24
MAX_ENTRY_BYTES = 65_536
REFUSAL_S = 60.0  # for so long, other processes get a remembered refusal instead of benchmarking
ACCURACY_LOST = 0.001  # a plan may lose 0.1 percentage points of held-out accuracy


class PlanSelection(Struct, frozen=True, kw_only=True):
    """The chosen plan, and the result of every candidate."""

    chosen: str
    results: tuple[PlanResult, ...]


class Planner:
    """Chooses, remembers and loads plans for one device. Safe in several processes at once."""

    def __init__(self, folder: Path, device: str, threads: int | None, wanted: str = AUTO) -> None:
        """Choose plans for one ``device`` and a number of ``threads``.

        Args:
            folder: the cache. If it cannot be written, a folder in /tmp takes its place.
            device: ``cpu`` or ``cuda:N``.
            threads: those of one forward pass; None lets the engine choose.
            wanted: ``auto``, or the name of the only plan that may be chosen.

        Raises:
            UsageError: there is no plan ``wanted``.
        """
        self.device = device
        self._threads = threads
        self._wanted = wanted
        self._candidates = catalogue() if wanted == AUTO else {wanted: find_plan(wanted)}
        self._folder = folder

    def load(self, bundle: Bundle) -> Classifier:
        """The classifier of ``bundle`` with the chosen plan, proved on the golden images.

        Raises:
            PlanUndecided: no plan was chosen yet, or the chosen plan no longer gives the published
                scores and was removed from the cache.
            BundleInvalid: the wanted plan is ``torch-eager`` or the version's ``reference_plan``,
                and it does not give the published scores.
        """
        if self._wanted in (EAGER, reference_plan(bundle.manifest).name):
            return self._open(bundle, find_plan(self._wanted))
        entry = self._entry(self._root(), bundle)
        selection = self._remembered(entry, bundle)
        if selection is None:
            raise PlanUndecided("no plan was chosen on this machine yet")
        try:
            return self._open(bundle, self._candidates[selection.chosen])
        except (BundleInvalid, DeviceUnavailable) as error:  # only these are the plan's fault
            _remove(entry)
            raise PlanUndecided(
                f"plan {selection.chosen} can no longer be loaded: {error}"
            ) from error

    def choose(self, bundle: Bundle, *, refresh: bool = False) -> PlanSelection:
        """The fastest plan for ``bundle`` and all results, from the cache if they are there.

        If they are not, all candidates are benchmarked now, which takes from ten seconds to
        minutes. Other processes that choose at the same time wait. They use the new result; a
        refusal is used for a minute.

        Args:
            bundle: the version.
            refresh: whether to benchmark again although the cache has a result.

        Raises:
            BundleInvalid: no plan, or not the wanted one, gives the published scores.
        """
        with self._lock() as root:
            entry = self._entry(root, bundle)
            selection = None if refresh else self._remembered(entry, bundle)
            if selection is None:
                refusal = entry.with_suffix(REFUSED)
                if not refresh and (reason := _fresh_text(refusal)):
                    raise BundleInvalid(reason)
                try:
                    selection = self._benchmark_candidates(bundle)
                    _replace(entry, msgspec.json.encode(selection))
                except BundleInvalid as error:
                    _replace(refusal, str(error).encode()[:MAX_ENTRY_BYTES])
                    raise
                finally:
                    _prune(root)
            return selection

    def _open(self, bundle: Bundle, plan: Plan) -> Classifier:
        fallback = None
        if self.device != "cpu":
            reference = reference_plan(bundle.manifest)
            fallback = load_classifier(PlanContext(bundle, "cpu", self._threads), reference)
        return load_classifier(PlanContext(bundle, self.device, self._threads), plan, fallback)

    def _entry(self, root: Path, bundle: Bundle) -> Path:
        """The cache's file for ``bundle``. Its name is a digest of all that decides the choice."""
        packages = sorted({name for plan in catalogue().values() for name in plan.packages})
        facts = {
            "schema": CACHE_SCHEMA,
            "manifest": bundle.manifest_sha256,  # covers the weights, golden images and network
            "machine": describe_machine(self.device),
            "device": self.device,
            "threads": self._threads,
            "wanted": self._wanted,
            "versions": {name: _version(name) for name in packages},
        }
        return root / (sha256_hex(json.dumps(facts, sort_keys=True).encode())[:24] + SELECTION)

    def _remembered(self, entry: Path, bundle: Bundle) -> PlanSelection | None:
        """The choice in the file ``entry``; None unless its plan may serve ``bundle`` here."""
        try:
            selection = msgspec.json.decode(_read_entry(entry), type=PlanSelection)
            for name in (selection.chosen, *(each.plan for each in selection.results)):
                if name not in self._candidates:
                    raise ValueError(f"it names {name[:40]!r}, which is not a candidate here")
            if reason := self._refusal(self._candidates[selection.chosen], bundle.manifest):
                raise ValueError(f"it chooses {selection.chosen}: {reason}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            log.warning("the remembered plan in %s is ignored: %s", entry, error)
            return None
        with contextlib.suppress(OSError):
            os.utime(entry)  # ``_prune`` removes the least recently used entries
        return selection

    def _root(self) -> Path:
        """The cache's folder, or this user's own folder in /tmp if that cannot be written."""
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._folder.is_dir() and os.access(self._folder, os.W_OK):
            return self._folder
        log.warning(
            "the cache of plans %s cannot be written; plans are remembered in /tmp only",
            self._folder,
        )
        self._folder = _private_folder(Path(tempfile.gettempdir(), f"convoy-plans-{os.getuid()}"))
        return self._folder

    @contextlib.contextmanager
    def _lock(self) -> Iterator[Path]:
        """Wait until no other process benchmarks, and keep others waiting until the block ends.

        Two benchmarks at once would spoil each other's timings. Yields the cache's folder.
        """
        root = self._root()
        # O_NOFOLLOW: a symbolic link in this place must not open another file for writing.
        descriptor = os.open(root / CHOOSING, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "rb"):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield root

    def _benchmark_candidates(self, bundle: Bundle) -> PlanSelection:
        """Prove and time every candidate; ``BundleInvalid`` if none may serve."""
        log.info("%s: benchmarking the plans on %s", bundle.manifest.model, self.device)
        results = tuple(self._benchmark(bundle, plan) for plan in self._candidates.values())
        accepted = [result for result in results if result.reason is None]
        if not accepted:
            raise BundleInvalid(
                f"no plan can serve it on {self.device}; "
                + "; ".join(f"{each.plan}: {each.reason}" for each in results)
            )
        best = min(accepted, key=lambda result: score(result.batch_ms))
        log.info("%s: plan %s is the fastest correct one", bundle.manifest.model, best.plan)
        return PlanSelection(chosen=best.plan, results=results)

    def _benchmark(self, bundle: Bundle, plan: Plan) -> PlanResult:
        if reason := self._refusal(plan, bundle.manifest):
            result = PlanResult(plan=plan.name, reason=reason)
        else:
            result = run_benchmark("try", plan.name, bundle, self.device, self._threads)
            if result.reason == KILLED:  # memory may have run out for another reason than the plan
                result = run_benchmark("try", plan.name, bundle, self.device, self._threads)
        log.info("%s", describe_result(result))
        return result

    def _refusal(self, plan: Plan, manifest: Manifest) -> str | None:
        """Why ``plan`` may not serve the version here, as far as is known without a benchmark."""
        return (
            plan.unsupported(self.device)
            or missing_exports(plan, manifest)
            or refused_by_record(plan, manifest)
        )


def reference_plan(manifest: Manifest) -> Plan:
    """The fp32 plan that scores a version where speed does not matter, and proves itself."""
    if isinstance(manifest.network, ListedNetwork):
        return find_plan(EAGER)
    plans = [find_plan(name) for name in GRAPH_REFERENCES]
    return next((each for each in plans if each.unsupported("cpu") is None), plans[0])


def score(batch_ms: dict[int, float]) -> float:
    """One figure to compare plans: the geometric mean of ms per image over the batch sizes.

    Serving runs single images when idle and full batches under load. In a geometric mean, twice the
    speed at one size makes up for half the speed at another. A plan without times is infinitely
    slow.
    """
    if not batch_ms:
        return math.inf
    return geometric_mean(milliseconds / size for size, milliseconds in batch_ms.items())


def missing_exports(plan: Plan, manifest: Manifest) -> str | None:
    """Why ``plan`` cannot run from the version's bundle, or None if it can."""
    if not plan.exports and not isinstance(manifest.network, ListedNetwork):
        return f"the version is {manifest.network}, which torch does not run"
    missing = [name for name in plan.exports if name not in manifest.files]
    return f"the version was published without {', '.join(missing)}" if missing else None


def refused_by_record(plan: Plan, manifest: Manifest) -> str | None:
    """Why the accuracies that publishing recorded rule ``plan`` out, or None if they do not."""
    if plan.precision == "fp32":
        return None
    accuracy = manifest.plan_accuracy.get(plan.name)
    fp32 = manifest.metrics.get("validation_accuracy", 1.0 if manifest.imported else None)
    if accuracy is None or fp32 is None:
        unproved = (
            "publishing recorded no held-out accuracy of it; "
            "publish the version on a machine that can run it"
        )
        return unproved if plan.precision == "int8" else None
    if fp32 - accuracy > ACCURACY_LOST:
        return (
            f"its held-out accuracy is {accuracy:.4f}, that of fp32 {fp32:.4f}; "
            f"it may be at most {ACCURACY_LOST:g} lower"
        )
    return None


def describe_result(result: PlanResult) -> str:
    """The result in one line, for logs and the command line."""
    if result.reason is not None:
        return f"{result.plan}: rejected: {result.reason}"
    times = ", ".join(f"{ms:.3g} ms at {size}" for size, ms in result.batch_ms.items())
    return f"{result.plan}: accepted, differs by {result.max_difference:.2g}; {times}"


def _read_entry(file: Path) -> bytes:
    """The content of a cache file; ``OSError`` unless it is a small regular file.

    A link in its place could lead to any file, and opening a pipe would wait forever.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as opened:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_ENTRY_BYTES:
            raise OSError(f"not a regular file of at most {MAX_ENTRY_BYTES} bytes")
        return opened.read(MAX_ENTRY_BYTES)


def _fresh_text(file: Path) -> str:
    """The text of a refusal that is less than ``REFUSAL_S`` old, else an empty string."""
    try:
        if 0 <= time.time() - file.lstat().st_mtime < REFUSAL_S:
            return _read_entry(file).decode(errors="replace")
    except OSError:
        pass
    return ""


def _replace(file: Path, data: bytes) -> None:
    """Write ``file``. A folder in its place is removed."""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    write_atomically(file, data)


def _private_folder(folder: Path) -> Path:
    """``folder`` if only this user can have written to it, else a new temporary folder."""
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix="convoy-plans-"))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()


def _prune(root: Path) -> None:
    """Remove all but the ``CACHE_ENTRIES`` most recently used choices, and remove old refusals."""
    for refusal in root.glob(f"*{REFUSED}"):
        if not _fresh_text(refusal):
            _remove(refusal)
    for old in sorted(root.glob(f"*{SELECTION}"), key=_last_used_s)[:-CACHE_ENTRIES]:
        _remove(old)


def _last_used_s(file: Path) -> float:
    try:
        return file.lstat().st_mtime
    except OSError:  # another worker could not load the choice and has just removed it
        return 0.0
