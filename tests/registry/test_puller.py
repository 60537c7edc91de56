"""The puller: versions on disk are complete and verified, and outlive the registry."""

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

import mlflow
import pytest

from registry.canary.monitor import CanaryMonitor
from registry.canary.traffic_stats import ServingStatus, VersionTraffic, WorkerReport
from registry.core.errors import BundleInvalid, RegistryUnavailable
from registry.core.names import sha256_hex
from registry.core.paths import Paths
from registry.delivery import downloads
from registry.delivery import puller as puller_module
from registry.delivery.deployment import (
    deployment_file,
    read_deployment,
    read_status,
    version_folder,
)
from registry.delivery.downloads import VERSIONS_KEPT
from registry.delivery.puller import Puller
from registry.model.bundle import WEIGHTS, open_bundle
from registry.model.refs import Canary, ModelRef
from registry.promotion.promotion import promote, start_canary, stop_canary
from registry.store.mlflow_store import ModelStore
from tests.conftest import WAIT_TIMEOUT_S, Publish, wait_for

REF = ModelRef("digits", alias="champion")


@pytest.fixture
def puller(store: ModelStore, registry_paths: Paths) -> Puller:
    return Puller(lambda: store, registry_paths, (REF,), monitor(registry_paths))


def monitor(paths: Paths) -> CanaryMonitor:
    return CanaryMonitor(paths, ("http://somewhere",), "puller")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_champion_is_on_disk_with_only_the_files_that_serving_needs(
    puller: Puller, store: ModelStore, publish: Publish, registry_paths: Paths
) -> None:
    version = publish()
    promote(store, "digits", 1)
    deployed = puller.pull(REF)
    assert [each.version for each in deployed.versions] == [1]
    folder = version_folder(registry_paths.models, "digits", 1)
    bundle = open_bundle(folder, version.manifest_sha256)
    assert files(folder) == {*bundle.serving_files(), "manifest.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["1"]
    assert puller.pull(REF) == deployed


def test_a_new_champion_is_followed_and_a_fixed_number_is_not(
    puller: Puller, store: ModelStore, publish: Publish, registry_paths: Paths
) -> None:
    publish(seed=0)
    promote(store, "digits", 1)
    assert puller.pull(REF).generation == 1
    publish(seed=1)
    promote(store, "digits", 2, force=True, reason="test")
    assert puller.pull(REF).versions[0].version == 2
    fixed = puller.pull(ModelRef("digits", version=1))
    assert (fixed.versions[0].version, fixed.versions[0].alias) == (1, None)
    assert fixed.generation == 1  # its deployment has its own file


def test_a_copy_that_was_damaged_on_disk_is_downloaded_again(
    store: ModelStore, publish: Publish, registry_paths: Paths
) -> None:
    publish()
    promote(store, "digits", 1)
    weights = version_folder(registry_paths.models, "digits", 1) / WEIGHTS
    puller = Puller(lambda: store, registry_paths, (REF,))
    puller.pull(REF)
    for each in (puller, Puller(lambda: store, registry_paths, (REF,))):
        weights.write_bytes(b"damaged")
        each.pull(REF)
        open_bundle(weights.parent).verify([WEIGHTS])


def test_a_failed_download_does_not_change_the_deployment(
    puller: Puller, store: ModelStore, publish: Publish, registry_paths: Paths
) -> None:
    publish(seed=0)
    promote(store, "digits", 1)
    before = puller.pull(REF)
    publish(seed=1)
    promote(store, "digits", 2, force=True, reason="test")
    for path in registry_paths.artifacts.rglob(WEIGHTS):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleInvalid):
        puller.pull(REF)
    assert read_deployment(registry_paths.models, REF) == before
    versions = version_folder(registry_paths.models, "digits", 1).parent
    assert [path.name for path in versions.iterdir()] == ["1"]
    assert not puller.pull_all()
    status = read_status(registry_paths.models, REF)
    assert status.agreed_unix_s is None
    assert "has sha256" in str(status.error)


def test_an_unreachable_registry_is_recorded_until_it_answers_again(
    store: ModelStore, publish: Publish, registry_paths: Paths
) -> None:
    publish()
    promote(store, "digits", 1)
    answers: Iterator[ModelStore | RegistryUnavailable] = iter(
        [store, RegistryUnavailable("down"), store]
    )

    def open_store() -> ModelStore:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    puller = Puller(open_store, registry_paths, (REF,))
    assert puller.pull_all()
    puller._store = None
    assert not puller.pull_all()
    assert read_status(registry_paths.models, REF).error == "down"
    assert read_deployment(registry_paths.models, REF) is not None
    assert puller.pull_all()
    assert read_status(registry_paths.models, REF).error is None


def test_a_damaged_deployment_file_is_replaced(
    puller: Puller, store: ModelStore, publish: Publish, registry_paths: Paths
) -> None:
    publish()
    promote(store, "digits", 1)
    puller.pull(REF)
    deployment_file(registry_paths.models, REF).write_text("{")
    assert puller.pull(REF).versions[0].version == 1


def test_a_disk_that_cannot_be_written_is_reported_but_not_fatal(
    puller: Puller,
    store: ModelStore,
    publish: Publish,
    registry_paths: Paths,
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish()
    promote(store, "digits", 1)
    registry_paths.models.write_text("a file where the folder should be")
    assert not puller.pull_all()
    assert "cannot follow" in caplog.text
    assert "cannot write the status" in caplog.text


def test_old_versions_are_removed_except_the_newest(
    puller: Puller, store: ModelStore, publish: Publish, registry_paths: Paths
) -> None:
    versions = registry_paths.models / "digits" / "versions"
    for number in range(100, 100 + VERSIONS_KEPT + 3):
        (versions / str(number)).mkdir(parents=True)
    publish()
    promote(store, "digits", 1)
    puller.pull(REF)
    assert len(list(versions.iterdir())) == VERSIONS_KEPT + 1
    assert (versions / "1").is_dir()


def test_the_puller_watches_until_it_is_stopped(
    puller: Puller, store: ModelStore, publish: Publish, registry_paths: Paths
) -> None:
    stop = Event()
    seen = Event()
    original = puller.pull_all

    def counted() -> bool:
        seen.set()
        return original()

    puller.pull_all = counted  # type: ignore[method-assign]
    thread = Thread(target=puller.watch, args=(stop, 0.01))
    thread.start()
    assert seen.wait(WAIT_TIMEOUT_S)
    stop.set()
    thread.join(WAIT_TIMEOUT_S)
    assert not thread.is_alive()


CANARY = Canary(version=2, share=0.25)


@pytest.fixture
def canary_started(store: ModelStore, publish: Publish) -> None:
    """Version 1 is champion, version 2 is its canary."""
    publish(seed=0)
    publish(seed=1)
    promote(store, "digits", 1)
    start_canary(store, "digits", CANARY, "to see")


def test_a_canary_is_deployed_together_with_the_champion(
    puller: Puller, store: ModelStore, canary_started: None, registry_paths: Paths
) -> None:
    deployed = puller.pull(REF)
    assert [(each.version, each.alias) for each in deployed.versions] == [
        (1, "champion"),
        (2, "challenger"),
    ]
    assert deployed.canary == CANARY
    assert puller.pull(ModelRef("digits", version=1)).canary is None
    store._client.set_registered_model_alias("digits", "champion", "2")  # outside Convoy
    assert puller.pull(REF).canary is None
    store._client.set_registered_model_alias("digits", "champion", "1")
    assert puller.pull(REF).canary == CANARY
    stop_canary(store, "digits", "seen enough")
    after = puller.pull(REF)
    assert ([each.version for each in after.versions], after.canary) == ([1], None)


def test_a_challenger_that_is_gone_or_damaged_does_not_delay_the_champion(
    puller: Puller, store: ModelStore, canary_started: None, registry_paths: Paths
) -> None:
    digest = store.resolve(ModelRef("digits", 2)).manifest_sha256
    for path in registry_paths.artifacts.rglob(WEIGHTS):
        if sha256_hex((path.parent / "manifest.json").read_bytes()) == digest:
            path.write_bytes(b"damaged")
    deployed = puller.pull(REF)
    assert ([each.version for each in deployed.versions], deployed.canary) == ([1], None)
    last = store.audit_logs.read("digits").lines[-1].entry
    assert (last.action, last.to_version) == ("refused", 2)
    assert "has sha256" in str(last.details)
    puller.pull(REF)
    Puller(lambda: store, registry_paths, (REF,), monitor(registry_paths)).pull(REF)
    assert len(store.audit_logs.read("digits").lines) == 3  # the refusal is recorded once
    mlflow.MlflowClient().delete_model_version("digits", "2")
    assert puller.pull(REF).canary is None


def poll_once(puller: Puller, monkeypatch: pytest.MonkeyPatch, **status: Any) -> None:
    found = ServingStatus(model="digits", generation=1, champion=1, challenger=2, **status)
    monkeypatch.setattr("registry.canary.monitor.read_serving_status", lambda services, name: found)
    puller.check_serving(REF)


def test_a_canary_that_breaks_the_policy_is_stopped_and_the_audit_log_says_why(
    store: ModelStore, canary_started: None, registry_paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    puller = Puller(lambda: store, registry_paths, (REF,), monitor(registry_paths))
    puller.pull(REF)
    good = VersionTraffic(version=1, requests=1000)
    poll_once(puller, monkeypatch, versions=(good,))
    failing = VersionTraffic(version=2, requests=10, errors=90)
    poll_once(puller, monkeypatch, versions=(good, failing))
    deployed = read_deployment(registry_paths.models, REF)
    assert deployed is not None
    assert (len(deployed.versions), deployed.canary) == (1, None)
    last = store.audit_logs.read("digits").lines[-1].entry
    assert last.action == "canary stopped"
    assert "90 of the challenger's 100 requests failed" in str(last.reason)
    assert last.by.startswith("puller on ")
    assert store.aliases.read_with_canary("digits")[1] is None


@pytest.mark.parametrize("characters", ["x", "\x00", "ü\n"])
def test_an_error_of_any_length_ends_a_canary(
    store: ModelStore,
    canary_started: None,
    registry_paths: Paths,
    monkeypatch: pytest.MonkeyPatch,
    characters: str,
) -> None:
    puller = Puller(lambda: store, registry_paths, (REF,), monitor(registry_paths))
    puller.pull(REF)
    poll_once(puller, monkeypatch)
    failing = WorkerReport(pid=7, model="digits", refused=2, error=characters * 500_000)
    poll_once(puller, monkeypatch, workers=(failing,))
    actions = [line.entry.action for line in store.audit_logs.read("digits").lines]
    assert actions[-2:] == ["refused", "canary stopped"]
    assert store.aliases.read_with_canary("digits")[1] is None


def test_a_puller_with_read_access_leaves_the_audit_log_to_the_control_plane(
    store: ModelStore, canary_started: None, registry_paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Puller(lambda: store, registry_paths, (REF,))
    reader.pull(REF)
    failing = VersionTraffic(version=2, requests=10, errors=90)
    answers = iter([[VersionTraffic(version=1, requests=1000)], [failing]])

    def read_serving_status(services: Any, name: str) -> ServingStatus:
        versions = tuple(next(answers, [failing]))
        return ServingStatus(model=name, generation=1, champion=1, challenger=2, versions=versions)

    monkeypatch.setattr("registry.canary.monitor.read_serving_status", read_serving_status)
    monkeypatch.setattr("registry.canary.monitor.POLL_INTERVAL_S", 0.01)
    before = len(store.audit_logs.read("digits").lines)
    reader.check_serving(REF)
    assert len(store.audit_logs.read("digits").lines) == before
    watch = CanaryMonitor(registry_paths, ("http://somewhere",), "control plane").watch
    stop = Event()
    thread = Thread(target=watch, args=(lambda: store, stop))
    thread.start()
    try:
        wait_for(lambda: store.aliases.read_with_canary("digits")[1] is None)
    finally:
        stop.set()
        thread.join()
    last = store.audit_logs.read("digits").lines[-1].entry
    assert (last.action, last.to_version) == ("canary stopped", 2)
    assert last.by.startswith("control plane on ")


def test_the_control_planes_monitor_survives_any_failure(
    registry_paths: Paths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("registry.canary.monitor.POLL_INTERVAL_S", 0.01)
    failures = iter([RegistryUnavailable("down"), RegistryUnavailable("down"), ValueError("odd")])
    opened, stop = list[int](), Event()

    def open_store() -> ModelStore:
        opened.append(1)
        if failure := next(failures, None):
            raise failure
        stop.set()
        raise RegistryUnavailable("down")

    CanaryMonitor(registry_paths, ("http://somewhere",), "control plane").watch(open_store, stop)
    assert len(opened) == 4
    warnings = [record.message for record in caplog.records if "not guarded" in record.message]
    assert warnings == ["canaries are not guarded: down", "canaries are not guarded: odd"]


def test_a_model_whose_canary_cannot_be_read_does_not_stop_the_guard_of_others(
    registry_paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.canary.monitor.POLL_INTERVAL_S", 0.01)
    polled: list[str] = []

    class Aliases:
        def read_with_canary(self, name: str) -> Any:
            if name == "broken":
                raise RegistryUnavailable("its tag cannot be read")
            return {}, None

    class Store:
        aliases = Aliases()

        def models(self) -> list[str]:
            return ["broken", "good"]

    monitor, stop = CanaryMonitor(registry_paths, ("http://somewhere",), "control plane"), Event()

    def poll_once(store: object, name: str, canary: object) -> None:
        polled.append(name)
        stop.set()

    monkeypatch.setattr(monitor, "poll_once", poll_once)
    monitor.watch(cast("Callable[[], ModelStore]", Store), stop)
    assert polled == ["good"]


def test_the_audit_log_records_once_that_a_worker_refuses_a_version(
    store: ModelStore, publish: Publish, registry_paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    promote(store, "digits", 1)
    puller = Puller(lambda: store, registry_paths, (REF,), monitor(registry_paths))
    puller.pull(REF)
    worker = WorkerReport(pid=1, model="digits", error="golden image 3 differs", refused=1)
    for _ in range(3):
        poll_once(puller, monkeypatch, workers=(worker,))
    lines = store.audit_logs.read("digits").lines
    assert [line.entry.action for line in lines] == ["promoted", "refused"]
    assert lines[1].entry.details == "golden image 3 differs"
    assert store.audit_logs.read("digits").champion == 1


def test_a_refusal_is_logged_once_if_the_audit_log_cannot_be_used(
    store: ModelStore,
    canary_started: None,
    registry_paths: Paths,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    puller = Puller(lambda: store, registry_paths, (REF,), monitor(registry_paths))
    puller.pull(REF)
    mlflow.MlflowClient().delete_registered_model("digits.ledger")
    worker = WorkerReport(pid=1, model="digits", error="golden image 3 differs", refused=1)
    for _ in range(3):
        poll_once(puller, monkeypatch, workers=(worker,))
    warning = "this machine cannot serve version 1 of digits (golden image 3 differs)"
    assert caplog.text.count(warning) == 1
    assert "its log, the registered model digits.ledger, is missing" in caplog.text


def test_a_decision_on_this_machine_wakes_the_puller(
    store: ModelStore, publish: Publish, registry_paths: Paths
) -> None:
    publish(seed=0)
    publish(seed=1)
    promote(store, "digits", 1)
    puller, stop = Puller(lambda: store, registry_paths, (REF,)), Event()
    thread = Thread(target=puller.watch, args=(stop, 3600))
    thread.start()
    try:
        wait_for(lambda: deployed_version(registry_paths) == 1)
        promote(store, "digits", 2, force=True, reason="test")
        wait_for(lambda: deployed_version(registry_paths) == 2)
    finally:
        stop.set()
        thread.join()


def deployed_version(paths: Paths) -> int | None:
    found = read_deployment(paths.models, REF)
    return found.versions[0].version if found else None


def test_a_canary_is_guarded_by_the_default_policy_if_its_own_is_invalid(
    store: ModelStore, canary_started: None, registry_paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry_paths.policy("digits").parent.mkdir()
    registry_paths.policy("digits").write_text("nonsense = 1")
    puller = Puller(lambda: store, registry_paths, (REF,), monitor(registry_paths))
    puller.pull(REF)
    good = VersionTraffic(version=1, requests=1000)
    poll_once(puller, monkeypatch, versions=(good,))
    poll_once(
        puller, monkeypatch, versions=(good, VersionTraffic(version=2, requests=10, errors=90))
    )
    assert store.audit_logs.read("digits").lines[-1].entry.action == "canary stopped"
    start_canary(store, "digits", CANARY)  # an equal canary, before the puller polls
    puller.pull(REF)
    poll_once(
        puller, monkeypatch, versions=(good, VersionTraffic(version=2, requests=10, errors=90))
    )
    assert store.aliases.read_with_canary("digits")[1] == CANARY


def test_an_unreachable_registry_ends_neither_the_champion_nor_the_canary(
    puller: Puller, store: ModelStore, canary_started: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = puller.pull(REF)
    resolve_in = store.resolve_in

    def flaky(aliases: Any, ref: Any) -> Any:
        if ref.version == 2:
            raise RegistryUnavailable("down")
        return resolve_in(aliases, ref)

    monkeypatch.setattr(store, "resolve_in", flaky)
    assert puller.pull(REF) == before


def test_an_unexpected_error_of_one_model_does_not_stop_another(
    store: ModelStore,
    publish: Publish,
    registry_paths: Paths,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish()
    promote(store, "digits", 1)
    other = ModelRef("other", alias="champion")
    puller = Puller(lambda: store, registry_paths, (other, REF))
    original = store.aliases.read_with_canary

    def odd(name: str) -> Any:
        if name == "other":
            raise ZeroDivisionError("odd")
        return original(name)

    monkeypatch.setattr(store.aliases, "read_with_canary", odd)
    assert not puller.pull_all()
    assert deployed_version(registry_paths) == 1
    assert any(record.levelname == "ERROR" for record in caplog.records)


class Clock:
    """Replaces the guard's clock and its stop event: each ``wait`` is a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *steps: tuple[float, bytes]) -> None:
        """``steps``: the seconds that each ``wait`` takes, and the bytes that arrive meanwhile."""
        self.now_s = 1000.0
        self.file = Path()
        self._steps = iter(steps)
        self._is_over = False
        monkeypatch.setattr("registry.delivery.puller.time.monotonic", lambda: self.now_s)

    def wait(self, timeout_s: float) -> bool:
        step = next(self._steps, None)
        if self._is_over or step is None:
            return True
        self.now_s += step[0]
        with self.file.open("ab") as file:
            file.write(step[1])
        return False

    def set(self) -> None:
        self._is_over = True


def ends_of_stalled(puller: Puller, paths: Paths, clock: Clock) -> list[float]:
    """The times at which a puller ends whose download starts now."""
    incoming = paths.models / "digits" / "versions" / f"{downloads.INCOMING}x"
    incoming.mkdir(parents=True)
    clock.file = incoming / "file"
    puller._downloads._incoming, puller._pulling_since = incoming, clock.now_s
    ends = list[float]()

    def end() -> None:
        ends.append(clock.now_s)
        clock.set()

    puller.end_if_stalled(clock, end)  # type: ignore[arg-type]
    return ends


def test_a_stalled_pull_ends_the_puller_and_records_the_reason(
    puller: Puller, registry_paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, *[(10, b"a byte or two")] * 20)
    began_s = clock.now_s
    (ended_s,) = ends_of_stalled(puller, registry_paths, clock)
    assert puller_module.STALL_TIMEOUT_S < ended_s - began_s < 2 * puller_module.STALL_TIMEOUT_S
    status = read_status(registry_paths.models, REF)
    assert "next to nothing" in str(status.error)


def test_a_pull_that_makes_progress_is_not_ended(
    puller: Puller, registry_paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, *[(50, bytes(90_000))] * 20)
    assert not ends_of_stalled(puller, registry_paths, clock)


def test_a_pull_that_exceeds_its_manifest_ends_the_puller(
    puller: Puller, registry_paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "MAX_EXTRA_BYTES", 1_000_000)
    clock = Clock(monkeypatch, *[(1, bytes(90_000))] * 20)
    began_s = clock.now_s
    (ended_s,) = ends_of_stalled(puller, registry_paths, clock)
    assert ended_s - began_s == 12  # 12 × 90,000 bytes are too many, 11 are not


def test_the_download_of_a_killed_puller_is_removed(
    puller: Puller, store: ModelStore, publish: Publish, registry_paths: Paths
) -> None:
    left = registry_paths.models / "digits" / "versions" / f"{downloads.INCOMING}left"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half")
    publish()
    promote(store, "digits", 1)
    puller.pull(REF)
    assert not left.exists()


def test_without_room_on_the_disk_nothing_is_downloaded(
    puller: Puller,
    store: ModelStore,
    publish: Publish,
    registry_paths: Paths,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish()
    promote(store, "digits", 1)
    monkeypatch.setattr(downloads, "MAX_EXTRA_BYTES", 10**18)
    assert not puller.pull_all()
    assert "are free" in caplog.text
    assert not version_folder(registry_paths.models, "digits", 1).exists()


def test_the_download_of_another_running_puller_is_kept(
    puller: Puller, store: ModelStore, publish: Publish, registry_paths: Paths
) -> None:
    other = registry_paths.models / "digits" / "versions" / f"{downloads.INCOMING}other"
    other.mkdir(parents=True)
    publish()
    promote(store, "digits", 1)
    with downloads._locked(other):
        puller.pull(REF)
        assert other.exists()


def test_an_abandoned_download_does_not_end_the_next_puller(
    puller: Puller, registry_paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "MAX_EXTRA_BYTES", 1000)
    left = registry_paths.models / "digits" / "versions" / f"{downloads.INCOMING}left"
    left.mkdir(parents=True)
    (left / "half").write_bytes(bytes(10_000))
    clock = Clock(monkeypatch, (1, b""), (1, b""))
    assert not ends_of_stalled(puller, registry_paths, clock)


@pytest.mark.slow
def test_a_champion_and_a_fixed_version_are_followed_in_one_home(
    store: ModelStore, publish: Publish, registry_paths: Paths
) -> None:
    pinned = ModelRef("digits", version=1)
    publish(seed=0)
    promote(store, "digits", 1)
    followers = [Puller(lambda: store, registry_paths, (ref,)) for ref in (REF, pinned)]
    for seed in range(1, VERSIONS_KEPT + 3):
        version = publish(seed=seed).version
        promote(store, "digits", version, force=True, reason="test")
        assert all(puller.pull_all() for puller in followers)
        champion, other = (read_deployment(registry_paths.models, ref) for ref in (REF, pinned))
        assert champion is not None
        assert other is not None
        assert (champion.versions[0].version, other.versions[0].version) == (version, 1)
    assert other is not None
    assert other.generation == 1  # its deployment never changed
    assert version_folder(registry_paths.models, "digits", 1).is_dir()
