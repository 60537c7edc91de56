"""``WorkerGroup``: the workers of one service on one machine, which switch at one moment.

Each worker loads a deployment by itself and reports that in a file. When all live workers have, one
of them changes a number in memory that all share, and with it what every worker serves. So a client
that saw an answer of the new version never sees one of the old version after it. A worker that
cannot load the deployment delays the switch; every worker can read its reason. Knows no HTTP.
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
    """All workers of a service, as seen by the one that owns this object."""

    def __init__(self, folder: Path | None = None) -> None:
        """Join the workers that share ``folder``; without one, the group is this worker alone."""
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="convoy-workers-"))
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
            # The lock is held until this object or the process ends, however it ends.
            alive = os.open(folder / f"{name}{_LOCK}", os.O_CREAT | os.O_WRONLY, 0o600)
            weakref.finalize(self, os.close, alive)
            fcntl.flock(alive, fcntl.LOCK_EX)
            self._write({})

    def active_deployment(self, model: str) -> "ActiveDeployment":
        """The shared record of which deployment of ``model`` all workers serve."""
        if model not in self._active:
            self._active[model] = ActiveDeployment(self, self._folder, model)
        return self._active[model]

    def report(self, report: WorkerReport) -> None:
        """Publish to all workers what this one serves, has prepared, or refuses."""
        with self._reporting:  # each model has a thread of its own
            if self._reports.get(report.model) != report:
                self._write({**self._reports, report.model: report})

    def reports(self, model: str) -> list[WorkerReport]:
        """A report on ``model`` from every live worker, sorted by process id.

        A worker that has not reported yet gets an empty report.
        """
        found = []
        for lock in self._folder.glob(f"*{_LOCK}"):
            if _is_held(lock):
                pid = int(lock.name.partition("-")[0])
                report = _read(lock.with_suffix(_STATE)).get(model)
                found.append(report or WorkerReport(pid=pid, model=model))
        return sorted(found, key=lambda report: report.pid)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """In the block, no worker can join, switch, or take back that it is prepared."""
        with (self._folder / "group").open("w") as file:
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
    """Which deployment of a model all workers serve: its key, in memory that they share."""

    def __init__(self, group: WorkerGroup, folder: Path, model: str) -> None:
        self._group = group
        self._model = model
        self._file = folder / f"{model}.deployment"
        descriptor = os.open(folder / f"{model}.serving", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, 8)
            # Eight aligned bytes: the CPU reads and writes them at once.
            self._shared = memoryview(mmap.mmap(descriptor, 8)).cast("q")
        finally:
            os.close(descriptor)

    @property
    def key(self) -> int:
        """The key of the deployment that serves; ``NOTHING`` before the first."""
        return self._shared[0]

    @property
    def deployment(self) -> Deployment | None:
        """The deployment that serves, for a worker that starts later; None before the first."""
        with self._group.locked():
            if self.key == NOTHING:
                return None
            deployment = msgspec.json.decode(self._file.read_bytes(), type=Deployment)
        # The keys differ if a worker was killed after it wrote the file and before it switched.
        return deployment if deployment.key == self.key else None

    def switch(self, deployment: Deployment) -> list[WorkerReport]:
        """Switch all workers to ``deployment`` if all have prepared it.

        The first switch waits for no other worker, as no client can see an older version.

        Returns:
            The reports of the workers that have not prepared it; empty if all workers serve it now.
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
                _replace(self._file, msgspec.json.encode(deployment))
                self._shared[0] = deployment.key
            return missing


def _replace(path: Path, data: bytes) -> None:
    """As ``write_atomically``, but unflushed: no worker needs the file once the machine crashed."""
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
