"""The workers of one service on one machine, who prepare apart and switch together.

Each worker loads a release by itself and says so in a file; when all that live have, one number in
memory that they share is changed, and with it what every one of them serves: from one instant to
the next, so nobody who saw an answer of the new version sees one of the old after it. A worker that
cannot prepare stops the switch, and its reason is there for all to show. Knows no network, no HTTP.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

import msgspec

from registry.canary.traffic_stats import WorkerReport
from registry.delivery.deployment import Deployment

NOTHING = 0
_LOCK, _STATE = ".lock", ".json"


class WorkerGroup:
    """The workers as one of them, who owns this object, sees them."""

    def __init__(self, folder: Path | None = None) -> None:
        """Join those who work in ``folder``; without one, a crew of one."""
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="convoy-crew-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._reports: dict[str, WorkerReport] = {}
        self._reporting = Lock()
        self._active: dict[str, ActiveDeployment] = {}
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._state = folder / f"{name}{_STATE}"
        with self.locked():
            self._forget_dead()
            # Held for as long as this object, or the process, lives, however that ends.
            alive = os.open(folder / f"{name}{_LOCK}", os.O_CREAT | os.O_WRONLY, 0o600)
            weakref.finalize(self, os.close, alive)
            fcntl.flock(alive, fcntl.LOCK_EX)
            self._write({})

    def active_deployment(self, model: str) -> "ActiveDeployment":
        """Where the crew agrees on what it serves of ``model``."""
        if model not in self._active:
            self._active[model] = ActiveDeployment(self, self._folder, model)
        return self._active[model]

    def report(self, report: WorkerReport) -> None:
        """Say to all what this worker serves, has prepared, or refuses."""
        with self._reporting:  # each model is looked after by a thread of its own
            if self._reports.get(report.model) != report:
                self._write({**self._reports, report.model: report})

    def reports(self, model: str) -> list[WorkerReport]:
        """What every worker that lives says of ``model``, by process id; empty ones included."""
        found = []
        for lock in self._folder.glob(f"*{_LOCK}"):
            if _is_held(lock):
                pid = int(lock.name.partition("-")[0])
                said = _read(lock.with_suffix(_STATE)).get(model)
                found.append(said or WorkerReport(pid=pid, model=model))
        return sorted(found, key=lambda report: report.pid)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody joins, switches or takes back that it is prepared meanwhile."""
        with (self._folder / "crew").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _forget_dead(self) -> None:
        for lock in self._folder.glob(f"*{_LOCK}"):
            if not _is_held(lock):
                lock.with_suffix(_STATE).unlink(missing_ok=True)
                lock.unlink(missing_ok=True)

    def _write(self, reports: dict[str, WorkerReport]) -> None:
        _replace(self._state, msgspec.json.encode(reports))
        self._reports = reports


class ActiveDeployment:
    """What a crew serves of one model: the key of a release, in memory that all workers share."""

    def __init__(self, group: WorkerGroup, folder: Path, model: str) -> None:
        self._group = group
        self._model = model
        self._deployment_file = folder / f"{model}.deployment"
        descriptor = os.open(folder / f"{model}.serving", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, 8)
            # Aligned, and so read and written whole.
            self._shared = memoryview(mmap.mmap(descriptor, 8)).cast("q")
        finally:
            os.close(descriptor)

    @property
    def key(self) -> int:
        """The key of the release that serves; ``NOTHING`` before the first."""
        return self._shared[0]

    @property
    def deployment(self) -> Deployment | None:
        """The release that serves, for a worker that comes later."""
        with self._group.locked():
            if self.key == NOTHING:
                return None
            deployment = msgspec.json.decode(self._deployment_file.read_bytes(), type=Deployment)
        # Another key: who was switching was killed before it had.
        return deployment if deployment.key == self.key else None

    def switch(self, deployment: Deployment) -> list[WorkerReport]:
        """Have all serve ``release`` from now on if all have prepared it; else who has not.

        At the very first nobody waits for others: there is no older version that one could see.
        """
        with self._group.locked():
            missing = [
                report
                for report in self._group.reports(self._model)
                if deployment.key not in (report.serving_key, report.prepared_key)
            ]
            if self.key == NOTHING:
                missing = []
            if not missing and self.key != deployment.key:
                _replace(self._deployment_file, msgspec.json.encode(deployment))
                self._shared[0] = deployment.key
            return missing


def _replace(path: Path, data: bytes) -> None:
    """As ``write_atomically``, without its flush: none of this outlives the machine."""
    temporary = path.with_suffix(".new")
    temporary.write_bytes(data)
    temporary.replace(path)


def _is_held(lock: Path) -> bool:
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _read(state: Path) -> dict[str, WorkerReport]:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(state.read_bytes(), type=dict[str, WorkerReport])
    return {}
