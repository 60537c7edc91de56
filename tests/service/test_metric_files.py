"""The counts of ended workers are kept, in a bounded number of files."""

import os
import runpy
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.mmap_dict import MmapedDict, mmap_key

import service
from service.observability.metric_files import AllProcesses, forget_process
from service.observability.metrics import Metrics


def write(folder: Path, kind: str, pid: int, name: str, value: float) -> None:
    """Write one metric as the worker with that process id would."""
    # Prometheus' client has no types for this class.
    file: Any = MmapedDict(str(folder / f"{kind}_{pid}.db"))  # type: ignore[no-untyped-call]
    label = {"histogram": ["le"]}.get(kind, [])
    sample = {"counter": f"{name}_total", "histogram": f"{name}_bucket"}.get(
        kind.split("_")[0], name
    )
    file.write_value(mmap_key(name, sample, label, ["+Inf"] if label else [], "help"), value, 0.0)
    file.close()


def values(folder: Path) -> dict[str, float]:
    return {
        sample.name: sample.value
        for family in AllProcesses(folder).collect()
        for sample in family.samples
    }


def test_counts_of_dead_workers_are_kept_in_a_bounded_number_of_files(tmp_path: Path) -> None:
    write(tmp_path, "counter", 1, "asked", 5)
    for pid in range(2, 60):
        write(tmp_path, "counter", pid, "asked", 2)
        write(tmp_path, "histogram", pid, "took", 1)
        write(tmp_path, "gauge_livesum", pid, "waiting", 3)
        forget_process(tmp_path, pid)
    assert values(tmp_path) == {"asked_total": 5 + 58 * 2, "took_bucket": 58.0, "took_count": 58.0}
    assert len(list(tmp_path.iterdir())) <= 4


def test_a_process_that_wrote_nothing_is_forgotten_without_an_error(tmp_path: Path) -> None:
    forget_process(tmp_path, 7)
    assert values(tmp_path) == {}


def test_no_scrape_sees_a_count_twice_or_not_at_all(tmp_path: Path) -> None:
    for pid in range(100):
        write(tmp_path, "counter", pid, "asked", 1)
    ended, seen = Event(), []

    def forget() -> None:
        for pid in range(100):
            forget_process(tmp_path, pid)
        ended.set()

    thread = Thread(target=forget)
    thread.start()
    while not ended.is_set():
        seen.append(values(tmp_path)["asked_total"])
    thread.join()
    assert set(seen) == {100.0}


def test_metrics_are_rendered_again_only_when_they_are_too_old() -> None:
    kept, fresh = Metrics(max_age_s=3600), Metrics()
    for metrics in (kept, fresh):
        metrics.expect("digits", "1")
        metrics.render()
        metrics.refused("digits", 1, "v1", "overload")
    labels = b'model_name="digits",model_version="1",outcome="overload",protocol="v1"'
    line = b"convoy_requests_total{" + labels + b"} %s"
    assert line % b"0.0" in kept.render()
    assert line % b"1.0" in fresh.render()


def test_gunicorns_arbiter_survives_metric_files_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CONVOY_RUN_FOLDER", "PROMETHEUS_MULTIPROC_DIR", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # the configuration sets them
    monkeypatch.setenv("CONVOY_RUN_FOLDER", str(tmp_path))
    configuration = runpy.run_path(str(Path(service.__file__).with_name("gunicorn.conf.py")))
    (tmp_path / "metrics" / "counter_7.db").touch()
    logged = []
    server = SimpleNamespace(log=SimpleNamespace(exception=lambda *text: logged.append(text)))
    configuration["child_exit"](server, SimpleNamespace(pid=7))
    assert len(logged) == 1
