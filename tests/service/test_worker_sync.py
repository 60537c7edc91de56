"""Workers load versions separately and switch together; here each is a slot in one process."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from registry.canary.traffic_stats import WorkerReport
from registry.delivery.deployment import DeployedVersion, Deployment, version_folder
from registry.model.bundle import WEIGHTS, Bundle
from registry.model.refs import ModelRef
from service.loading import version_loader, version_switch
from service.loading.model_slot import ModelSlot
from service.loading.worker_sync import NOTHING, WorkerGroup
from tests.service.conftest import load

REF = ModelRef("digits", alias="champion")


@pytest.fixture
def worker(tmp_path: Path, models: Path) -> Callable[[], ModelSlot]:
    """Makes workers of one group."""
    return lambda: ModelSlot(REF, models, load, group=WorkerGroup(tmp_path / "workers"))


def version(slot: ModelSlot) -> int | None:
    return slot.current.version if slot.current else None


def test_all_workers_switch_as_soon_as_the_last_one_has_prepared(
    worker: Callable[[], ModelSlot], deploy: Callable[..., Bundle]
) -> None:
    one, two = worker(), worker()
    deploy(1)
    one.refresh()
    assert version(one) == 1  # the first switch waits for no other worker
    two.refresh()
    assert (version(one), version(two)) == (1, 1)
    deploy(2, seed=1)
    two.refresh()
    assert (version(one), version(two)) == (1, 1)
    one.refresh()
    assert (version(one), version(two)) == (2, 2)  # ``two`` has not polled since
    assert sorted(each.version or 0 for each in one.workers()) == [1, 2]
    two.refresh()
    assert [each.version for each in one.workers()] == [2, 2]


def test_a_worker_that_cannot_prepare_delays_the_switch_and_reports_why(
    worker: Callable[[], ModelSlot],
    deploy: Callable[..., Bundle],
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(version_loader, "RETRY_S", 0.0)
    monkeypatch.setattr(version_switch, "WAITING_S", -1.0)
    one, two = worker(), worker()
    deploy(1)
    for each in (one, two):
        each.refresh()
    deploy(2, seed=1)
    one.refresh()
    weights = version_folder(models, "digits", 2) / WEIGHTS
    good = weights.read_bytes()
    weights.write_bytes(b"damaged")
    two.refresh()
    one.refresh()
    assert (version(one), version(two)) == (1, 1)
    assert "has sha256" in str(two.error)
    assert f"generation 2 waits for worker {os.getpid()}: " in str(one.error)
    assert "has sha256" in str(one.error)
    assert {each.refused for each in two.workers()} == {None, 2}
    weights.write_bytes(good)
    two.refresh()
    assert (version(one), version(two), two.error) == (2, 2, None)


def test_a_worker_that_starts_late_begins_with_the_version_of_the_others(
    worker: Callable[[], ModelSlot], deploy: Callable[..., Bundle], models: Path
) -> None:
    one = worker()
    deploy(1)
    one.refresh()
    deploy(2, seed=1)
    (version_folder(models, "digits", 2) / WEIGHTS).write_bytes(b"damaged")
    late = worker()
    assert late.require().champion.version == 1
    late.refresh()
    assert (version(late), version(one)) == (1, 1)
    assert "has sha256" in str(late.error)


def test_a_deployment_that_is_replaced_before_all_have_it_never_serves(
    worker: Callable[[], ModelSlot], deploy: Callable[..., Bundle]
) -> None:
    one, two = worker(), worker()
    deploy(1)
    for each in (one, two):
        each.refresh()
    deploy(2, seed=1)
    one.refresh()
    deploy(1)
    for each in (one, two, one):
        each.refresh()
    assert (version(one), version(two)) == (1, 1)
    assert [each.generation for each in one.workers()] == [3, 3]


def test_the_switch_does_not_wait_for_a_worker_that_was_killed(
    tmp_path: Path, worker: Callable[[], ModelSlot], deploy: Callable[..., Bundle]
) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from service.loading.worker_sync import WorkerGroup\n"
        "group = WorkerGroup(Path(sys.argv[1]))\n"
        "print(len(group.reports('digits')), flush=True)\n"
        "sys.stdin.read()"
    )
    one = worker()
    deploy(1)
    one.refresh()
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "workers")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"2\n"
        deploy(2, seed=1)
        one.refresh()
        assert version(one) == 1
        other.kill()
        other.wait()
        one.refresh()
    assert version(one) == 2
    assert [each.pid for each in one.workers()] == [os.getpid()]
    WorkerGroup(tmp_path / "workers")  # a worker that joins removes the files of dead ones
    assert len(list((tmp_path / "workers").glob("*.lock"))) == 2


def test_a_switch_whose_worker_was_killed_half_way_did_not_happen(tmp_path: Path) -> None:
    group = WorkerGroup(tmp_path)
    active_deployment = group.active_deployment("digits")
    one, two = (
        Deployment(
            schema_version=2,
            model="digits",
            generation=number,
            versions=(DeployedVersion(version=number, manifest_sha256="a" * 64, alias=None),),
        )
        for number in (1, 2)
    )
    active_deployment.switch(one)
    # A worker wrote the file and was killed before it changed the key.
    (tmp_path / "digits.deployment").write_bytes(msgspec.json.encode(two))
    assert active_deployment.deployment is None
    assert active_deployment.key == one.key


def test_models_that_report_at_once_do_not_lose_a_report(tmp_path: Path) -> None:
    group = WorkerGroup(tmp_path)

    def report(model: str) -> None:
        for number in range(300):
            group.report(WorkerReport(pid=1, model=model, version=number))

    threads = [threading.Thread(target=report, args=(model,)) for model in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [group.reports(model)[0].version for model in ("a", "b", "c")] == [299] * 3


def test_all_workers_see_a_report_and_a_switch_waits_for_all(tmp_path: Path) -> None:
    one, two = WorkerGroup(tmp_path), WorkerGroup(tmp_path)
    active = one.active_deployment("digits"), two.active_deployment("digits")
    deployed = DeployedVersion(version=1, manifest_sha256="a" * 64, alias="champion")
    deployment = Deployment(schema_version=2, model="digits", generation=1, versions=(deployed,))
    first = msgspec.structs.replace(deployment, generation=7)
    assert (active[0].key, active[1].deployment) == (NOTHING, None)
    assert active[0].switch(first) == []
    assert len(active[0].switch(deployment)) == 2
    one.report(WorkerReport(pid=1, model="digits", prepared_key=deployment.key))
    (missing,) = active[0].switch(deployment)
    assert missing.prepared_key == NOTHING
    two.report(WorkerReport(pid=2, model="digits", prepared_key=deployment.key))
    assert active[1].switch(deployment) == []
    assert (active[0].key, active[0].deployment) == (deployment.key, deployment)
    assert two.active_deployment("another").key == NOTHING


def test_a_replaced_version_stays_in_memory_for_a_while(
    models: Path, deploy: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []

    def counted(bundle: Any, deployed: Any) -> Any:
        loads.append(deployed.version)
        return load(bundle, deployed)

    for keep_s, expected in ((60.0, [1, 2]), (0.0, [1, 2, 1])):
        loads.clear()
        slot = ModelSlot(REF, models, counted, keep_warm_s=keep_s)
        for number in (1, 2, 1):
            deploy(number, seed=number)
            assert slot.refresh()
            slot.refresh()
        assert loads == expected


def test_a_limited_number_of_replaced_versions_stays_in_memory(
    models: Path, deploy: Callable[..., Bundle]
) -> None:
    loads: list[int] = []

    def counted(bundle: Any, deployed: Any) -> Any:
        loads.append(deployed.version)
        return load(bundle, deployed)

    slot = ModelSlot(REF, models, counted, keep_warm_s=600)
    for number in (1, 2, 3, 4, 2, 4, 3, 1):
        deploy(number, seed=number)
        slot.refresh()
    assert version_loader.MAX_WARM == 2
    assert loads == [1, 2, 3, 4, 1]
