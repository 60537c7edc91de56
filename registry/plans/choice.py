"""Which plan is fastest here: candidates are built, proved on the golden images, timed, remembered.

Each candidate is tried in a process of its own (``registry.plans.trial``), so that an engine that
crashes on this machine is a rejected plan and not a dead worker, and so that the memory that is
measured is what a worker with that plan will have. Knows neither torch nor any engine.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean

import msgspec
from msgspec import Struct

from registry.bundle import Bundle, read_digested
from registry.classifier import Classifier, load_classifier
from registry.contract import Manifest, sha256_hex
from registry.devices import describe_machine
from registry.errors import BundleInvalid, PlanUndecided
from registry.plans.plan import Plan, ReadArtefact, Source, catalogue, find_plan
from registry.plans.torch_eager import EAGER
from registry.plans.trial import KILLED, Finding, Step, run_trials

log = logging.getLogger(__name__)

AUTO, EVERY = "auto", "every"
# Raised when a verdict would come out differently although nothing that it hangs on has changed.
CACHE_SCHEMA = 3
ARTEFACTS = "artefacts"
CHOOSING, REFUSED = ".choosing-", ".refused"
CACHE_ENTRIES = 24
REFUSAL_S = 60.0  # for so long, others that ask hear of a refusal that was found out
ACCURACY_LOST = 0.001  # of all held-out pictures: 0.1 points


class Choice(Struct, frozen=True, kw_only=True):
    """The plan that serves, and what was found out about every one."""

    chosen: str
    findings: tuple[Finding, ...]
    digests: dict[str, str]
    """SHA-256 of each of the chosen plan's artefacts, by file name."""


class Planner:
    """Chooses, remembers and loads plans for one device. Safe in several processes at once."""

    def __init__(self, folder: Path, device: str, threads: int | None, wanted: str = AUTO) -> None:
        """Plans are chosen for one ``device`` and so many ``threads`` of a forward pass.

        Args:
            folder: the cache; one in /tmp where it cannot be written.
            device: ``cpu`` or ``cuda:N``.
            threads: of one forward pass; None leaves the engine's own choice.
            wanted: ``auto``; a plan's name to have that one or nothing; or ``every`` to try also
                those that take long to build.

        Raises:
            UsageError: there is no such plan.
        """
        if wanted not in (AUTO, EVERY):
            find_plan(wanted)
        self.device = device
        self._threads = threads
        self._wanted = wanted
        self._folder = folder

    def load(self, bundle: Bundle) -> Classifier:
        """The classifier of ``bundle`` by the plan that was chosen, proved on the golden images.

        Raises:
            PlanUndecided: nothing was chosen yet, or what was chosen was damaged, or no longer
                scores as was published; then it is forgotten.
            BundleInvalid: the pinned plan ``torch-eager`` does not score as was published.
        """
        if self._wanted == EAGER:
            return self._open(bundle, find_plan(EAGER), _no_artefacts)
        entry = self._root() / self._key(bundle)
        choice = _remembered(entry)
        if choice is None:
            raise PlanUndecided(f"{bundle.manifest.model}: no plan was chosen on this machine yet")
        try:
            return self._open(
                bundle,
                find_plan(choice.chosen),
                lambda file: read_digested(entry / ARTEFACTS / file, choice.digests.get(file)),
            )
        except BundleInvalid as error:  # anything else says nothing about what was chosen
            shutil.rmtree(entry, ignore_errors=True)
            raise PlanUndecided(
                f"{bundle.manifest.model}: plan {choice.chosen} can no longer be loaded: {error}"
            ) from error

    def choose(self, bundle: Bundle, *, anew: bool = False) -> Choice:
        """What was found out about the plans for ``bundle``, from the cache if it is there.

        Else it is found out now, which takes from ten seconds to minutes; other processes that
        ask for the same wait, and hear of a refusal that is a minute old at most.

        Raises:
            BundleInvalid: no plan, or not the one that is wanted, scores as was published.
        """
        with self._lock() as root:
            entry = root / self._key(bundle)
            choice = None if anew else _remembered(entry)
            if choice is None:
                refusal = entry.with_suffix(REFUSED)
                if not anew and (reason := _fresh_text(refusal)):
                    raise BundleInvalid(reason)
                try:
                    choice = self._try_candidates(bundle, entry)
                except BundleInvalid as error:
                    refusal.write_text(str(error))
                    raise
                finally:
                    _prune(root)
            return choice

    def _open(self, bundle: Bundle, plan: Plan, read: ReadArtefact) -> Classifier:
        fallback = None
        if self.device != "cpu":
            eager = find_plan(EAGER)
            fallback = load_classifier(Source(bundle, "cpu", self._threads), eager, _no_artefacts)
        return load_classifier(Source(bundle, self.device, self._threads), plan, read, fallback)

    def _key(self, bundle: Bundle) -> str:
        """Names everything that a verdict hangs on."""
        packages = sorted({name for plan in catalogue().values() for name in plan.packages})
        facts = {
            "schema": CACHE_SCHEMA,
            "manifest": bundle.manifest_sha256,  # names the weights, the golden images, the network
            "machine": describe_machine(self.device),
            "device": self.device,
            "threads": self._threads,
            "wanted": self._wanted,
            "versions": {name: _version(name) for name in packages},
        }
        return sha256_hex(json.dumps(facts, sort_keys=True).encode())[:24]

    def _root(self) -> Path:
        """The cache's folder, or where it cannot be written, one of this user's in /tmp."""
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._folder.is_dir() and os.access(self._folder, os.W_OK):
            return self._folder
        log.warning("%s cannot be written: plans are remembered in /tmp only", self._folder)
        self._folder = _private_folder(Path(tempfile.gettempdir(), f"convoy-plans-{os.getuid()}"))
        return self._folder

    @contextlib.contextmanager
    def _lock(self) -> Iterator[Path]:
        """One process chooses, the others wait: two would spoil each other's timings.

        Yields the cache's folder.
        """
        root = self._root()
        with (root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield root

    def _try_candidates(self, bundle: Bundle, target: Path) -> Choice:
        """Build, prove and time; the result lies under ``target``."""
        plans = catalogue()
        quick = [plan for plan in plans.values() if not plan.builds_slowly]
        slow = [plan for plan in plans.values() if plan.builds_slowly]
        if self._wanted == EVERY:
            quick, slow = quick + slow, []
        elif self._wanted != AUTO:
            quick, slow = [plans[self._wanted]], []
        log.info("%s: choosing a plan on %s", bundle.manifest.model, self.device)
        work = Path(tempfile.mkdtemp(prefix=CHOOSING, dir=target.parent))
        try:
            findings = self._find_out(bundle, quick, work)
            if slow and all(
                plans[each.plan].packages == ("torch",) for each in _accepted(findings)
            ):
                findings += self._find_out(bundle, slow, work)
            accepted = _accepted(findings)
            if not accepted:
                raise BundleInvalid(
                    f"{bundle.manifest.model}: no plan can serve it on {self.device}; "
                    + "; ".join(f"{each.plan}: {each.reason}" for each in findings)
                )
            best = min(accepted, key=lambda finding: score(finding.batch_ms))
            digests = _digests(work / best.plan)
            choice = Choice(chosen=best.plan, findings=tuple(findings), digests=digests)
            (work / best.plan).rename(work / ARTEFACTS)
            for plan in plans:
                shutil.rmtree(work / plan, ignore_errors=True)
            (work / "choice.json").write_bytes(msgspec.json.encode(choice))
            _remove(target)
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        log.info("%s: plan %s is the fastest that is right", bundle.manifest.model, best.plan)
        return choice

    def _find_out(self, bundle: Bundle, plans: Sequence[Plan], work: Path) -> list[Finding]:
        """A finding for each of ``plans``, in their order."""
        found: dict[str, Finding] = {}
        for plan in plans:
            reason = (
                plan.unsupported(self.device)
                or missing_exports(plan, bundle.manifest)
                or refused_by_record(plan, bundle.manifest)
            )
            if reason:
                found[plan.name] = Finding(plan=plan.name, reason=reason)
        waiting = [plan.name for plan in plans if plan.name not in found]
        for finding in self._run("build", waiting, bundle, work):
            found[finding.plan] = finding
        for name in waiting:
            if found[name].reason is None:
                (tried,) = self._run("try", [name], bundle, work)
                if tried.reason == KILLED:  # for want of memory, perhaps: not the plan's fault yet
                    (tried,) = self._run("try", [name], bundle, work)
                found[name] = msgspec.structs.replace(tried, build_s=found[name].build_s)
            log.info("%s", describe_finding(found[name]))
        return [found[plan.name] for plan in plans]

    def _run(self, step: Step, names: list[str], bundle: Bundle, work: Path) -> list[Finding]:
        return run_trials(step, names, bundle, work, self.device, self._threads)


def score(batch_ms: dict[int, float]) -> float:
    """One figure to compare plans by: the geometric mean of ms per image over the batch sizes.

    Serving meets single images when idle and full batches under load; a geometric mean lets a
    plan that is twice as fast at one size make up for one that is twice as fast at another. A plan
    without times is infinitely slow.
    """
    if not batch_ms:
        return math.inf
    return geometric_mean(milliseconds / size for size, milliseconds in batch_ms.items())


def missing_exports(plan: Plan, manifest: Manifest) -> str | None:
    """Why ``plan`` has nothing to read in the version's bundle, or None."""
    missing = [name for name in plan.exports if name not in manifest.files]
    return f"the version was published without {', '.join(missing)}" if missing else None


def refused_by_record(plan: Plan, manifest: Manifest) -> str | None:
    """Why the accuracy that was recorded when the version was published rules ``plan`` out."""
    if plan.precision == "fp32":
        return None
    accuracy = manifest.plan_accuracy.get(plan.name)
    fp32 = manifest.metrics.get("validation_accuracy")
    if accuracy is None or fp32 is None:
        unproved = "its held-out accuracy was not recorded when the version was published"
        return unproved if plan.precision == "int8" else None
    if fp32 - accuracy > ACCURACY_LOST:
        return f"its held-out accuracy is {accuracy:.4f}, that of fp32 {fp32:.4f}"
    return None


def describe_finding(finding: Finding) -> str:
    """One line for people."""
    if finding.reason is not None:
        return f"{finding.plan}: rejected: {finding.reason}"
    times = ", ".join(f"{ms:.3g} ms at {size}" for size, ms in finding.batch_ms.items())
    return f"{finding.plan}: accepted, differs by {finding.max_difference:.2g}; {times}"


def _remembered(entry: Path) -> Choice | None:
    file = entry / "choice.json"
    try:
        choice = msgspec.json.decode(file.read_bytes(), type=Choice)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        log.warning("%s is ignored: %s", file, error)
        return None
    with contextlib.suppress(OSError):
        os.utime(entry)  # the least recently used are pruned
    return choice


def _fresh_text(file: Path) -> str:
    try:
        return file.read_text() if time.time() - file.stat().st_mtime < REFUSAL_S else ""
    except OSError:
        return ""


def _accepted(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.reason is None]


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_hex(path.read_bytes()) for path in sorted(folder.iterdir())}


def _no_artefacts(file: str) -> bytes:
    raise BundleInvalid(f"this plan has no file {file}")


def _private_folder(folder: Path) -> Path:
    """``folder`` if only this user can have written to it, else a new one."""
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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _prune(root: Path) -> None:
    """Keep the entries that were used last, and nothing of who was killed while choosing."""
    for refusal in root.glob(f"*{REFUSED}"):
        if not _fresh_text(refusal):
            refusal.unlink(missing_ok=True)
    for left in root.glob(f"{CHOOSING}*"):
        shutil.rmtree(left, ignore_errors=True)
    entries = [path for path in root.iterdir() if (path / "choice.json").exists()]
    for old in sorted(entries, key=lambda path: -path.stat().st_mtime)[CACHE_ENTRIES:]:
        shutil.rmtree(old, ignore_errors=True)
