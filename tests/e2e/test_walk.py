"""The main walk with real processes: train, promote, serve, classify, promote another, stop."""

import contextlib
import http.client
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from tests.conftest import WAIT_TIMEOUT_S, free_port, wait_for
from tests.e2e.processes import Service, run
from training.data.sources import Dataset

pytestmark = pytest.mark.e2e


def test_a_promotion_reaches_every_worker_and_fails_no_request(
    paths: Path, service: Service, digits: Dataset
) -> None:
    png = digits.test.encode(0)
    status, answer = service.ask("POST", "/v1/classify", png)
    assert (status, answer["model"]["version"]) == (200, 1)

    answers: list[tuple[int, int | None]] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            status, answer = service.ask("POST", "/v1/classify", png)
            answers.append((status, answer.get("model", {}).get("version")))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        promoted = run(paths, "registry", "promote", "digits", "challenger")
        assert promoted.returncode == 0, promoted.stderr
        wait_for(lambda: {version for _, version in answers[-100:]} == {2}, "version 2 never came")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {status for status, _ in answers} == {200}
    assert {version for _, version in answers} == {1, 2}

    def counted() -> float:
        """The answered requests of all workers."""
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=WAIT_TIMEOUT_S)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith("convoy_requests_total{") and 'outcome="ok"' in line
        )

    wait_for(lambda: counted() == len(answers) + 1, "requests were not counted")
    assert service.stop() == 0


def test_a_puller_that_dies_is_started_again(service: Service) -> None:
    def puller() -> psutil.Process | None:
        for child in service.process.children():
            with contextlib.suppress(psutil.Error):  # a zombie has no command line
                if "registry" in child.cmdline():
                    return child
        return None

    wait_for(lambda: puller() is not None, "there is no puller")
    first = puller()
    assert first is not None
    first.kill()
    wait_for(lambda: (p := puller()) is not None and p.pid != first.pid, "no new puller")
    assert service.is_ready()
    assert service.stop() == 0


def test_a_restart_serves_from_disk_without_the_registry(paths: Path, service: Service) -> None:
    wait_for(
        lambda: (paths / "models/digits/deployment@champion.json").exists(), "nothing was deployed"
    )
    assert service.stop() == 0
    (paths / "mlflow.db").rename(paths / "gone.db")
    again = Service(paths, "--no-pull")
    try:
        wait_for(again.is_ready, "not ready from disk")
    finally:
        assert again.stop() == 0


def test_a_missing_device_ends_the_service_with_the_reason(paths: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    environment = {**os.environ, "CONVOY_HOME": str(paths), "CONVOY_DEVICE": "cuda"}
    environment["CONVOY_PORT"] = str(free_port())
    ended = subprocess.run(
        [sys.executable, "-m", "service", "--no-pull"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_TIMEOUT_S,
    )
    assert ended.returncode != 0
    assert "device cuda cannot run a kernel" in ended.stderr


def test_a_gpu_is_owned_by_one_process_and_may_be_lost(
    paths: Path, tmp_path: Path, digits: Dataset
) -> None:
    """Real processes on a stand-in device: the owner is killed, then the device is lost."""
    assert run(paths, "registry", "pull", "models:/digits@champion").returncode == 0
    lost, held = tmp_path / "lost", tmp_path / "held"
    service = Service(
        paths,
        "--no-pull",
        module=("tests.stand_in_gpu", "serve"),
        STAND_IN_LOST=str(lost),
        STAND_IN_HELD=str(held),
    )
    png = digits.test.encode(0)

    def child(word: str) -> psutil.Process | None:
        for each in service.process.children():
            with contextlib.suppress(psutil.Error):  # a zombie has no command line
                if word in each.cmdline():
                    return each
        return None

    def device() -> str | None:
        found: str | None = service.ask("GET", "/v1/models")[1]["models"][0]["device"]
        return found

    def all_workers_use(wanted: str) -> bool:
        return {device() for _ in range(20)} == {wanted}  # connections of both workers

    try:
        wait_for(service.is_ready, "the service did not become ready")
        wait_for(lambda: all_workers_use("cuda:0 (stand-in)"), "workers are not on the GPU")
        before = service.ask("POST", "/v1/classify", png)
        gunicorn, owner = child("gunicorn"), child("own")
        assert gunicorn is not None
        assert owner is not None
        workers = {each.pid for each in gunicorn.children()}

        held.touch()
        owner.kill()
        wait_for(lambda: service.ask("GET", "/readyz")[0] == 503, "ready without a device")
        assert service.ask("POST", "/v1/classify", png)[0] == 503
        held.unlink()
        wait_for(lambda: all_workers_use("cuda:0 (stand-in)"), "no new owner")
        after = service.ask("POST", "/v1/classify", png)
        assert (before[0], after[0]) == (200, 200)
        assert before[1]["predictions"] == after[1]["predictions"]

        lost.touch()
        assert service.ask("POST", "/v1/classify", png)[0] == 503
        wait_for(lambda: all_workers_use("cpu"), "the CPU did not take over")
        after = service.ask("POST", "/v1/classify", png)
        assert (after[0], after[1]["predictions"]) == (200, before[1]["predictions"])
        assert {each.pid for each in gunicorn.children()} == workers
    finally:
        assert service.stop() == 0
    log = service.log.read_text()
    assert "the GPU's process ended with status -9; starting it again in 1 s" in log
    assert "the GPU was lost: CUDA error: device-side assert" in log


HANG_ONCE = """
import os, time
from pathlib import Path
from service.inference.batcher import MicroBatcher

begin = MicroBatcher.__init__

def begin_with_a_hook(self, compute, *arguments, **named):
    def may_hang(pixels):
        try:
            Path(os.environ["HANG"]).unlink()
        except FileNotFoundError:
            return compute(pixels)
        time.sleep(3600)

    begin(self, may_hang, *arguments, **named)

MicroBatcher.__init__ = begin_with_a_hook
"""


def test_a_worker_whose_forward_pass_hangs_is_replaced(
    paths: Path, tmp_path: Path, digits: Dataset
) -> None:
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(HANG_ONCE)
    hang = tmp_path / "hang"
    service = Service(
        paths,
        PYTHONPATH=os.pathsep.join([str(tmp_path / "hooks"), os.environ.get("PYTHONPATH", "")]),
        HANG=str(hang),
        CONVOY_WORKERS="1",
        CONVOY_FORWARD_TIMEOUT_S="5",  # a pass of milliseconds may take a second on a busy machine
    )
    try:
        wait_for(service.is_ready, "the service did not become ready")
        png = digits.test.encode(0)
        assert service.ask("POST", "/v1/classify", png)[0] == 200
        hang.touch()
        with pytest.raises(
            OSError, match=r"without response|reset"
        ):  # the watchdog ended its worker
            service.ask("POST", "/v1/classify", png)
        wait_for(service.is_ready, "no other worker came")
        assert service.ask("POST", "/v1/classify", png)[0] == 200
        assert "a forward pass has not ended" in service.log.read_text()
    finally:
        service.stop()
