"""Workers prepare apart and switch together; here each is a slot of its own in one process."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from registry.canary.traffic_stats import WorkerReport
from registry.delivery.deployment import DeployedVersion, Deployment, version_folder
from registry.model.bundle import WEIGHTS
from registry.model.refs import ModelRef
from service.loading import version_loader, version_switch
from service.loading.model_slot import ModelSlot
from service.loading.worker_sync import NOTHING, WorkerGroup
from tests.service.conftest import load

REF = ModelRef("digits", alias="champion")


@pytest.fixture
def worker(tmp_path: Path, models: Path) -> Callable[[], ModelSlot]:
    """Makes a worker of one crew."""
    return lambda: ModelSlot(REF, models, load, group=WorkerGroup(tmp_path / "crew"))


def version(slot: ModelSlot) -> int | None:
    return slot.current.version if slot.current else None


def test_all_switch_in_the_moment_in_which_the_last_has_prepared(worker, deploy) -> None:
    one, two = worker(), worker()
    deploy(1)
    one.refresh()
    assert version(one) == 1  # at the very first nobody waits
    two.refresh()
    assert (version(one), version(two)) == (1, 1)
    deploy(2, seed=1)
    two.refresh()
    assert (version(one), version(two)) == (1, 1)
    one.refresh()
    assert (version(one), version(two)) == (2, 2)  # though the other has not looked since
    assert sorted(each.version for each in one.workers()) == [1, 2]
    two.refresh()
    assert [each.version for each in one.workers()] == [2, 2]


def test_a_worker_that_cannot_prepare_stops_the_switch_and_says_so(
    worker, deploy, models: Path, monkeypatch: pytest.MonkeyPatch
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
    whole = weights.read_bytes()
    weights.write_bytes(b"damaged")
    two.refresh()
    one.refresh()
    assert (version(one), version(two)) == (1, 1)
    assert "has sha256" in str(two.error)
    assert f"generation 2 waits for worker {os.getpid()}: " in str(one.error)
    assert "has sha256" in str(one.error)
    assert {each.refused for each in two.workers()} == {None, 2}
    weights.write_bytes(whole)
    two.refresh()
    assert (version(one), version(two), two.error) == (2, 2, None)


def test_who_comes_late_begins_with_what_the_others_serve(worker, deploy, models: Path) -> None:
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


def test_a_release_that_is_taken_back_before_all_have_it_never_serves(worker, deploy) -> None:
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


def test_a_worker_that_was_killed_is_not_waited_for(tmp_path: Path, worker, deploy) -> None:
    script = (
        "import sys; from pathlib import Path; from service.loading.worker_sync import Crew\n"
        "crew = Crew(Path(sys.argv[1])); print(len(crew.reports('digits')), flush=True)\n"
        "sys.stdin.read()"
    )
    one = worker()
    deploy(1)
    one.refresh()
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "crew")],
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
    WorkerGroup(tmp_path / "crew")  # whoever joins sweeps up
    assert len(list((tmp_path / "crew").glob("*.lock"))) == 2


def test_a_switch_whose_worker_was_killed_half_way_is_none(tmp_path: Path) -> None:
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
    (tmp_path / "digits.deployment").write_bytes(msgspec.json.encode(two))  # and then it died
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


def test_a_report_is_seen_by_all_and_a_switch_waits_for_all(tmp_path: Path) -> None:
    one, two = WorkerGroup(tmp_path), WorkerGroup(tmp_path)
    posts = one.active_deployment("digits"), two.active_deployment("digits")
    deployed = DeployedVersion(version=1, manifest_sha256="a" * 64, alias="champion")
    deployment = Deployment(schema_version=2, model="digits", generation=1, versions=(deployed,))
    first = msgspec.structs.replace(deployment, generation=7)
    assert (posts[0].key, posts[1].deployment) == (NOTHING, None)
    assert posts[0].switch(first) == []
    assert len(posts[0].switch(deployment)) == 2
    one.report(WorkerReport(pid=1, model="digits", prepared_key=deployment.key))
    (missing,) = posts[0].switch(deployment)
    assert missing.prepared_key == NOTHING
    two.report(WorkerReport(pid=2, model="digits", prepared_key=deployment.key))
    assert posts[1].switch(deployment) == []
    assert (posts[0].key, posts[0].deployment) == (deployment.key, deployment)
    assert two.active_deployment("another").key == NOTHING


def test_a_version_that_was_left_stays_in_memory_for_a_while(
    models: Path, deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []

    def counted(bundle, deployed):
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


def test_only_so_many_versions_stay_in_memory(models: Path, deploy) -> None:
    loads: list[int] = []

    def counted(bundle, deployed):
        loads.append(deployed.version)
        return load(bundle, deployed)

    slot = ModelSlot(REF, models, counted, keep_warm_s=600)
    for number in (1, 2, 3, 4, 2, 4, 3, 1):
        deploy(number, seed=number)
        slot.refresh()
    assert version_loader.MAX_WARM == 2
    assert loads == [1, 2, 3, 4, 1]
