"""Deployments with real processes: broken versions are refused, and no request fails."""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlflow
import msgspec
import numpy as np
import psutil
import pytest
import safetensors.numpy

from registry.core.errors import PromotionRefused
from registry.core.paths import Paths
from registry.model.bundle import GOLDEN, WEIGHTS, Bundle, GoldenImage, open_bundle, write_bundle
from registry.model.refs import Canary, ModelRef
from registry.promotion.promotion import promote, roll_back, start_canary
from registry.store.mlflow_store import ModelStore
from tests.conftest import wait_for
from tests.e2e.processes import Service
from training.data.sources import Dataset
from training.publishing.tracking import start_run

pytestmark = pytest.mark.e2e


@pytest.fixture
def store(paths: Path) -> ModelStore:
    return ModelStore(Paths(paths))


class Answer(NamedTuple):
    """When a request was sent and answered, its status, and the version that answered."""

    sent: float
    done: float
    status: int
    version: int | None


@pytest.fixture
def answers(service: Service, digits: Dataset) -> Iterator[list[Answer]]:
    """The answers to three clients that send requests until the test ends."""
    found: list[Answer] = []
    stop, png = threading.Event(), digits.test.encode(0)

    def ask() -> None:
        while not stop.is_set():
            sent = time.monotonic()
            status, answer = service.ask("POST", "/v1/classify", png)
            version = answer.get("model", {}).get("version")
            found.append(Answer(sent, time.monotonic(), status, version))
            time.sleep(0.002)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    yield found
    stop.set()
    for thread in threads:
        thread.join()


def first_answer(answers: list[Answer], version: int, since: float) -> float:
    """Wait until ``version`` has answered a request sent after ``since``; returns when it did."""

    def times() -> list[float]:
        fresh = [each for each in list(answers) if each.sent > since]
        return [each.done for each in fresh if each.version == version]

    wait_for(times, f"version {version} does not answer")
    return min(times())


def served_by_all(service: Service, version: int) -> bool:
    workers = service.ask("GET", "/v1/models/digits")[1]["workers"]
    return len(workers) == 2 and {each["version"] for each in workers} == {version}


def republish(
    store: ModelStore, paths: Path, change: Callable[[Bundle, dict[str, bytes]], None]
) -> int:
    """Register a copy of version 1 with changed files; returns its number."""
    folder = paths / "copied" / "original"
    shutil.rmtree(folder.parent, ignore_errors=True)
    original = store.download(store.resolve(ModelRef("digits", 1)), folder)
    files = {name: original.read(name) for name in original.manifest.files}
    change(original, files)
    bundle = write_bundle(folder.parent / "bundle", original.manifest, files)
    with start_run(store, "convoy", "broken"):
        return store.publish(bundle, {}).version


def with_nan(bundle: Bundle, files: dict[str, bytes]) -> None:
    weights = {name: np.full_like(each, np.nan) for name, each in bundle.weights().items()}
    files[WEIGHTS] = safetensors.numpy.save(weights)


def with_other_golden(bundle: Bundle, files: dict[str, bytes]) -> None:
    files[GOLDEN] = msgspec.json.encode(
        [GoldenImage(each.file, each.probabilities[::-1]) for each in bundle.golden()]
    )


def with_other_report(bundle: Bundle, files: dict[str, bytes]) -> None:
    files["report/report.html"] = b"another"


def test_broken_versions_are_refused_with_a_reason_and_the_old_version_answers_all_requests(
    paths: Path, service: Service, store: ModelStore, answers: list[Answer]
) -> None:
    def failed_switches() -> float:
        text = service.text("/metrics")
        rows = [row for row in text.splitlines() if 'outcome="failed"' in row and "switches" in row]
        return sum(float(row.rpartition(" ")[2]) for row in rows)

    def refusal(version: int) -> str | None:
        for line in store.audit_logs.read("digits").lines:
            if (line.entry.action, line.entry.to_version) == ("refused", version):
                return line.entry.details
        return None

    def is_refused(version: int) -> bool:
        return refusal(version) is not None

    def more_switches_failed_than(before: float) -> bool:
        return failed_switches() > before

    for change, why in (
        (with_nan, "NaN or infinite"),
        (with_other_golden, "from the published probability"),
    ):
        before = failed_switches()
        version = republish(store, paths, change)
        promote(store, "digits", version, force=True, reason="a test")
        wait_for(partial(is_refused, version), f"{change.__name__} is not in the audit log")
        (ready,) = service.ask("GET", "/readyz")[1]["models"]
        assert ready["version"] == 1
        assert why in ready["error"], ready
        assert why in str(refusal(version))
        wait_for(partial(more_switches_failed_than, before), "the failed switch was not counted")
        roll_back(store, "digits", "it is broken")
        wait_for(
            lambda: service.ask("GET", "/readyz")[1]["models"][0]["error"] is None,
            "the error stays",
        )

    damaged = republish(store, paths, with_other_report)
    promoted = store.resolve(ModelRef("digits", damaged))
    for path in Paths(paths).artifacts.rglob(WEIGHTS):
        if open_bundle(path.parent).manifest_sha256 == promoted.manifest_sha256:
            path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PromotionRefused, match="has sha256"):
        promote(store, "digits", damaged)
    store._client.set_registered_model_alias("digits", "champion", str(damaged))
    wait_for(
        lambda: (
            "has sha256" in str(service.ask("GET", "/readyz")[1]["models"][0]["registry_error"])
        ),
        "the puller has not refused it",
    )
    assert "has sha256" in str(refusal(damaged))

    store._client.set_registered_model_alias("digits", "champion", "1")
    wait_for(
        lambda: service.ask("GET", "/readyz")[1]["models"][0]["registry_error"] is None,
        "the registry's error stays",
    )
    mlflow.MlflowClient(store.connection.uri).delete_model_version("digits", "1")
    wait_for(
        lambda: service.ask("GET", "/readyz")[1]["models"][0]["registry_error"] is not None,
        "the puller has not reported that the champion is gone",
    )
    assert service.ask("GET", "/readyz")[0] == 200
    assert {(each.status, each.version) for each in answers} == {(200, 1)}


def test_workers_switch_together_on_a_promotion_and_on_a_roll_back(
    paths: Path, service: Service, store: ModelStore, answers: list[Answer]
) -> None:
    decisions: list[tuple[Callable[[], object], int]] = [
        (lambda: promote(store, "digits", 2), 2),
        (lambda: roll_back(store, "digits"), 1),
        (lambda: roll_back(store, "digits"), 2),
    ]
    for decide, version in decisions:
        began = time.monotonic()
        decide()
        wait_for(partial(served_by_all, service, version), f"not all serve version {version}")
        first = first_answer(answers, version, began)
        # Requests that are sent after the new version's first answer must all get that version.
        # Earlier ones may still get the old one.
        first_answer(answers, version, first)
        assert {each.version for each in list(answers) if each.sent > first} == {version}
    assert {each.status for each in answers} == {200}


def give_the_shadow_normal_priority(service: Service) -> None:
    """Let the shadow run while the cores are busy: by design it runs on an idle core only."""
    for child in service.process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            if "service.shadow.process" in child.cmdline():
                for thread in child.threads():
                    os.sched_setscheduler(thread.id, os.SCHED_OTHER, os.sched_param(0))


def test_a_challenger_scores_in_the_shadow(
    service: Service, store: ModelStore, answers: list[Answer]
) -> None:
    start_canary(store, "digits", Canary(version=2, shadow=1.0), "to see")

    def scored() -> int:
        give_the_shadow_normal_priority(service)
        versions = service.ask("GET", "/v1/models/digits/traffic")[1]["versions"]
        return sum(each["agreed"] + each["differed"] for each in versions if each["version"] == 2)

    wait_for(lambda: scored() > 0, "nothing is scored in the shadow")
    assert {each.version for each in answers} == {1}


def test_a_canary_that_cannot_be_loaded_is_stopped_by_the_puller(
    paths: Path, service: Service, store: ModelStore, answers: list[Answer], digits: Dataset
) -> None:
    start_canary(store, "digits", Canary(version=2, share=1.0), "all of it")
    wait_for(lambda: answers[-1].version == 2, "the challenger does not answer")
    assert service.ask("GET", "/v1/models/digits/traffic")[1]["challenger"] == 2
    broken = republish(store, paths, with_nan)
    start_canary(store, "digits", Canary(version=broken, share=0.5), "it is broken")
    wait_for(
        lambda: store.aliases.read_with_canary("digits")[1] is None, "the broken canary goes on"
    )
    last = store.audit_logs.read("digits").lines[-1].entry
    assert (last.action, last.to_version) == ("canary stopped", broken)
    assert "cannot serve the challenger" in str(last.reason)
    assert last.by.startswith("puller on ")
    wait_for(lambda: answers[-1].version == 1, "the champion does not answer again")
    assert {each.status for each in answers} == {200}
