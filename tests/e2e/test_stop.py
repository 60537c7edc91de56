"""A service whose processes are stopped for a while, as by `docker pause`."""

import signal
import time
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.e2e.processes import Service

pytestmark = pytest.mark.e2e
TIMEOUT_S = 15


def test_no_worker_dies_because_the_service_was_stopped_for_a_while(paths: Path) -> None:
    service = Service(
        paths, GUNICORN_CMD_ARGS=f"--timeout {TIMEOUT_S}", CONVOY_FORWARD_TIMEOUT_S="5"
    )
    try:
        wait_for(service.is_ready, "the service did not become ready")
        family = [service.process, *service.process.children(recursive=True)]
        log_before = service.log.read_text()  # a slow load may have caused a time-out before this
        for process in family:
            process.send_signal(signal.SIGSTOP)
        continue_at = time.monotonic() + 2 * TIMEOUT_S  # twice the arbiter's time-out
        wait_for(lambda: time.monotonic() > continue_at, "the clock stands still")
        for process in family:
            process.send_signal(signal.SIGCONT)
        check_at = time.monotonic() + TIMEOUT_S
        wait_for(lambda: service.is_ready() and time.monotonic() > check_at, "not ready again")
        assert "WORKER TIMEOUT" not in service.log.read_text().removeprefix(log_before)
        assert {each.pid for each in family} == {
            each.pid for each in [service.process, *service.process.children(recursive=True)]
        }
    finally:
        service.stop()
