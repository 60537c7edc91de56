"""Rates that services share in a real Redis, and what becomes of them without it."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.errors import RateExceeded, UsageError
from service.door import Buckets, Door
from service.settings import Settings
from service.shared_rate import SharedBuckets
from tests.conftest import free_port

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="no redis-server (apt install redis-server)"
)


class Server:
    """A Redis on loopback that keeps nothing."""

    def __init__(self, folder: Path, port: int) -> None:
        self.url = f"redis://127.0.0.1:{port}/0"
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        self.process = subprocess.Popen(
            ["redis-server", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return
            except OSError:
                time.sleep(0.02)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path, free_port())
    yield started
    started.stop()


def shared(url: str, rate: float, burst: int) -> SharedBuckets:
    return SharedBuckets(url, rate, burst, Buckets(rate, burst))


@needs_redis
def test_two_services_share_a_callers_bucket(server: Server) -> None:
    doors = [Door(Settings(rate=0.1, burst=3, rate_store=server.url)) for _ in range(2)]
    for door in (doors[0], doors[1], doors[0]):
        door.admit({"REMOTE_ADDR": "192.0.2.7"})
    for door in doors:
        with pytest.raises(RateExceeded) as refused:
            door.admit({"REMOTE_ADDR": "192.0.2.7"})
        assert 5 <= refused.value.retry_after_s <= 10
        door.admit({"REMOTE_ADDR": "192.0.2.8"})


@needs_redis
def test_a_bucket_fills_again_and_is_forgotten(server: Server) -> None:
    buckets = shared(server.url, rate=20, burst=2)
    assert [buckets.take("x") for _ in range(2)] == [0, 0]
    wait_s = buckets.take("x")
    assert 0 < wait_s <= 0.05
    time.sleep(wait_s + 0.005)
    assert buckets.take("x") == 0
    time.sleep(0.15)
    listed = subprocess.run(
        ["redis-cli", "-u", server.url, "dbsize"], capture_output=True, text=True, check=True
    )
    assert listed.stdout.strip() == "0"


@needs_redis
def test_while_redis_is_gone_each_service_counts_for_itself(server: Server, tmp_path: Path) -> None:
    buckets = shared(server.url, rate=0.1, burst=1)
    assert buckets.take("x") == 0
    assert buckets.take("x") > 0
    server.stop()
    assert buckets.take("x") == 0  # its own bucket was full
    assert buckets.take("x") > 0
    again = Server(tmp_path, int(server.url.split(":")[2].split("/")[0]))
    try:
        buckets._down_until = 0.0
        assert buckets.take("x") == 0  # the new one knows nothing
        assert buckets.take("x") > 0
    finally:
        again.stop()


@needs_redis
def test_a_redis_that_is_slow_is_left_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    buckets = shared(server.url, rate=0.1, burst=1)
    asked: list[str] = []
    script = buckets._script

    def late(**arguments: object) -> object:
        asked.append("x")
        time.sleep(0.04)
        return script(**arguments)

    monkeypatch.setattr(buckets, "_script", late)
    assert buckets.take("x") == 0
    assert buckets.take("x") == 0  # its own bucket was full
    assert buckets.take("x") > 0
    assert len(asked) == 1


def test_a_redis_that_hangs_holds_up_nobody_for_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        buckets = shared(f"redis://127.0.0.1:{silent.getsockname()[1]}", rate=100, burst=100)
        began = time.monotonic()
        for _ in range(50):
            assert buckets.take("x") == 0
        assert time.monotonic() - began < 0.5


def test_what_is_no_address_stops_the_start() -> None:
    with pytest.raises(UsageError, match="CONVOY_RATE_STORE"):
        shared("http://127.0.0.1", rate=1, burst=1)
