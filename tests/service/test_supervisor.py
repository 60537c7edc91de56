"""The processes that the supervisor starts besides gunicorn, with small scripts in their place."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from registry.core.errors import UsageError
from service import supervisor
from service.settings import MAX_PARENT_BYTES
from service.supervisor import SupervisedProcess
from tests.conftest import wait_for


def script(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_process_that_ends_is_started_again_after_a_growing_pause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)
    starts = tmp_path / "starts"
    supervised = SupervisedProcess("it", script(f"open({str(starts)!r}, 'a').write('x'); exit(3)"))

    def started(times: int) -> bool:
        supervised.poll_once()
        return starts.exists() and len(starts.read_text()) >= times

    wait_for(lambda: started(3))
    supervised.end()
    assert "it ended with status 3; starting it again in 0 s" in caplog.text
    assert supervised._pause_s >= 0.04


def test_a_process_that_cannot_be_started_is_tried_again_and_raises_no_error(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)
    supervised = SupervisedProcess("it", script("pass"))
    failures = iter([OSError(11, "Resource temporarily unavailable")])
    start = supervisor._start

    def fail_once(*arguments: Any, **named: Any) -> Any:
        for failure in failures:
            raise failure
        return start(*arguments, **named)

    monkeypatch.setattr(supervisor, "_start", fail_once)

    def started() -> bool:
        supervised.poll_once()
        return supervised._process is not None

    assert not started()
    wait_for(started)
    supervised.end()
    assert "cannot start it: [Errno 11]" in caplog.text


def test_a_process_that_ignores_sigterm_learns_of_the_end_from_its_standard_input(
    tmp_path: Path,
) -> None:
    """The GPU's process ignores SIGTERM."""
    ready = tmp_path / "ready"
    supervised = SupervisedProcess(
        "it",
        script(
            "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            f"open({str(ready)!r}, 'w'); sys.stdin.read(); sys.exit(5)"
        ),
    )
    supervised.poll_once()
    assert supervised.wait_for(ready) is None
    process = supervised._process
    supervised.end()
    assert process is not None
    assert process.returncode == 5


def test_waiting_for_a_process_ends_if_the_process_ends_or_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = SupervisedProcess("it", script("exit(2)"))
    ends.poll_once()
    assert ends.wait_for(tmp_path / "never") == 2
    ends.end()
    hangs = SupervisedProcess("it", script("import sys; sys.stdin.read()"))
    hangs.poll_once()
    monkeypatch.setattr(supervisor, "START_S", 0.1)
    with pytest.raises(UsageError, match=r"within 0\.1 s; set CONVOY_DEVICE=cpu"):
        hangs.wait_for(tmp_path / "never")
    hangs.end()


def test_a_process_ends_when_its_parent_is_killed() -> None:
    code = (
        "import sys, time; from service.supervisor import _start;"
        "child = _start([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(script(code), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_the_folder_of_a_run_lies_in_tmpdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parent(tmpdir: Path) -> Path:
        monkeypatch.setattr(tempfile, "tempdir", None)  # so that TMPDIR is read again
        monkeypatch.setenv("TMPDIR", str(tmpdir))
        with supervisor._run_folder() as folder:
            assert Path(folder).stat().st_mode & 0o777 == 0o700
            return Path(folder).parent

    short = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        assert parent(short) == short
    finally:
        short.rmdir()
    long = tmp_path / ("x" * MAX_PARENT_BYTES)
    long.mkdir()
    assert parent(long) == Path("/tmp")  # below ``long`` a socket's path would not fit

    def fail(*arguments: object, **named: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", fail)
    with pytest.raises(UsageError, match=r"Read-only file system.*TMPDIR"):
        supervisor._run_folder()
