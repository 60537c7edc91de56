"""The files in which the workers of a service share their metrics.

prometheus_client gives every process files of its own. It never removes those with counters, as
the sums would fall. After 2,000 workers had died, the files took 129 MB, and a scrape took 170 ms.
So ``forget_process`` adds the counters of an ended worker to one common file, and removes its own.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import multiprocess
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector


class AllProcesses:
    """Collects the metrics of all processes that wrote to ``folder``, also of ended ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        """The metrics read from the files now; waits while ``forget_process`` changes them."""
        with _locked(self._folder, fcntl.LOCK_SH):
            # The second argument is not typed in prometheus_client 0.26.
            collector = MultiProcessCollector(None, str(self._folder))  # type: ignore[no-untyped-call]
            return list(collector.collect())  # type: ignore[no-untyped-call]


def forget_process(folder: Path, pid: int) -> None:
    """Keep the counts of an ended process, and remove its files."""
    with _locked(folder, fcntl.LOCK_EX):
        multiprocess.mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
        for kind in ("counter", "histogram"):
            ended = folder / f"{kind}_{pid}.db"
            if ended.exists():
                _add(ended, folder / f"{kind}_dead.db")
                ended.unlink()


def _add(source: Path, target: Path) -> None:
    """Add every value of the file ``source`` to the same one in ``target``."""
    sums = MmapedDict(str(target))  # type: ignore[no-untyped-call]
    try:
        for key, value, timestamp, _ in MmapedDict.read_all_values_from_file(str(source)):  # type: ignore[no-untyped-call]
            before, _ = sums.read_value(key)  # type: ignore[no-untyped-call]
            sums.write_value(key, before + value, timestamp)  # type: ignore[no-untyped-call]
    finally:
        sums.close()  # type: ignore[no-untyped-call]


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Hold the folder's lock: a scrape in the middle of a removal would count a process twice."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)
