import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest

from registry.core.errors import BundleInvalid, ModelNotReady, PlanUndecided
from registry.delivery.deployment import deployment_file, version_folder
from registry.model.bundle import WEIGHTS, Bundle
from registry.model.refs import ModelRef
from service.inference.batcher import Prediction
from service.inference.loaded_model import ServedModel
from service.loading import deployment_watcher, version_loader
from service.loading.model_slot import ModelSlot
from tests.conftest import wait_for
from tests.service.conftest import REF, load
from training.data.sources import Dataset


def test_without_a_deployment_a_model_is_not_ready_and_the_error_says_what_to_run(
    slot: ModelSlot,
) -> None:
    assert not slot.refresh()
    with pytest.raises(ModelNotReady, match="convoy pull models:/digits@champion"):
        slot.require()


def test_a_deployment_is_loaded_once(slot: ModelSlot, deploy: Callable[..., Bundle]) -> None:
    deploy(1)
    assert slot.refresh()
    served = slot.require().champion
    assert (served.name, served.version, served.alias) == ("digits", 1, "champion")
    assert not slot.refresh()
    assert slot.require().champion is served


def test_a_new_deployment_takes_over_and_the_old_object_still_answers(
    slot: ModelSlot, deploy: Callable[..., Bundle], few_digits: Dataset
) -> None:
    deploy(1, seed=0)
    slot.refresh()
    old = slot.require().champion
    deploy(2, seed=1)
    assert slot.refresh()
    assert slot.require().champion.version == 2
    image = few_digits.test.pixels[0]
    answers = [
        each.batcher.wait(each.batcher.put([image], 5)[0])
        for each in (old, slot.require().champion)
    ]
    before, after = (each.row for each in answers if isinstance(each, Prediction))
    assert not np.allclose(before, after)


def test_a_broken_version_is_logged_once_and_the_old_one_keeps_serving(
    slot: ModelSlot,
    deploy: Callable[..., Bundle],
    models: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deploy(1)
    slot.refresh()
    deploy(2, seed=1)
    weights = version_folder(models, "digits", 2) / WEIGHTS
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])
    monkeypatch.setattr(version_loader, "RETRY_S", 0.0)
    assert not slot.refresh()
    assert not slot.refresh()
    assert slot.require().champion.version == 1
    assert "has sha256" in str(slot.error)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "version 1 keeps serving" in warnings[0].getMessage()
    weights.write_bytes(good)
    assert slot.refresh()
    assert (slot.require().champion.version, slot.error) == (2, None)


def test_a_failed_load_is_not_tried_again_at_once(
    slot: ModelSlot, deploy: Callable[..., Bundle], models: Path
) -> None:
    deploy(1)
    weights = version_folder(models, "digits", 1) / WEIGHTS
    good = weights.read_bytes()
    weights.write_bytes(b"")
    assert not slot.refresh()
    weights.write_bytes(good)
    assert not slot.refresh()


def test_a_slot_follows_a_deployment_file_that_was_lost_and_came_back(
    slot: ModelSlot, deploy: Callable[..., Bundle], models: Path
) -> None:
    deploy(1)
    slot.refresh()
    content = deployment_file(models, REF).read_bytes()
    deployment_file(models, REF).unlink()
    slot.refresh()
    assert "nothing is deployed" in str(slot.error)
    deployment_file(models, REF).write_bytes(content)
    assert not slot.refresh()
    assert slot.error is None
    deployment_file(models, REF).unlink()
    deploy(2, seed=1)  # its generation is 1 again
    assert slot.refresh()
    assert slot.require().champion.version == 2


def test_a_request_loads_the_deployment_if_nothing_is_loaded_yet(
    slot: ModelSlot, deploy: Callable[..., Bundle]
) -> None:
    with pytest.raises(ModelNotReady):
        slot.require()
    deploy(1)
    assert slot.require().champion.version == 1


def test_many_first_requests_load_only_once(models: Path, deploy: Callable[..., Bundle]) -> None:
    loads = []

    def counted(bundle: Any, deployed: Any) -> Any:
        loads.append(deployed.version)
        return load(bundle, deployed)

    slot = ModelSlot(ModelRef("digits", alias="champion"), models, counted)
    deploy(1)
    threads = [threading.Thread(target=slot.require) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == [1]


def test_a_slot_follows_the_deployment_of_its_own_reference(
    slot: ModelSlot, models: Path, deploy: Callable[..., Bundle]
) -> None:
    deploy(2)
    pinned = ModelSlot(ModelRef("digits", version=1), models, load)
    assert not pinned.refresh()
    assert "nothing is deployed" in str(pinned.error)
    deploy(1, alias=None)
    assert pinned.refresh()
    assert slot.refresh()
    current = [each.current.version if each.current else None for each in (pinned, slot)]
    assert current == [1, 2]


def test_a_deployment_file_with_another_version_is_refused(
    models: Path, deploy: Callable[..., Bundle]
) -> None:
    deploy(1)
    pinned = ModelRef("digits", version=7)
    deployment_file(models, REF).rename(deployment_file(models, pinned))
    slot = ModelSlot(pinned, models, load)
    assert not slot.refresh()
    assert "has no models:/digits/7" in str(slot.error)


def test_a_damaged_deployment_file_does_not_stop_the_watcher(
    slot: ModelSlot, deploy: Callable[..., Bundle], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment_watcher, "POLL_S", 0.005)
    monkeypatch.setattr(version_loader, "RETRY_S", 0.0)
    (models / "digits").mkdir(parents=True)
    deployment_file(models, REF).write_text("{")
    others = set(threading.enumerate())
    stop = slot.start()
    wait_for(lambda: slot.error is not None)
    deploy(1)
    wait_for(lambda: slot.current is not None)
    stop.set()
    wait_for(lambda: set(threading.enumerate()) <= others)


def test_on_switch_is_called_for_switches_and_failures(
    models: Path, deploy: Callable[..., Bundle]
) -> None:
    events: list[tuple[int | None, int | None]] = []

    def note(name: str, before: ServedModel | None, after: ServedModel | None) -> None:
        events.append((before.version if before else None, after.version if after else None))

    slot = ModelSlot(ModelRef("digits", alias="champion"), models, load, on_switch=note)
    slot.refresh()  # nothing is deployed: no version failed
    deploy(1)
    slot.refresh()
    (deploy(2).folder / WEIGHTS).write_bytes(b"damaged")
    slot.refresh()
    assert events == [(None, 1), (1, None)]


def test_a_plan_is_chosen_before_a_version_is_loaded_and_meanwhile_the_old_one_serves(
    models: Path, deploy: Callable[..., Bundle], slot: ModelSlot
) -> None:
    deploy(1)
    chosen: list[int] = []

    def undecided(bundle: Any, deployed: Any) -> Any:
        if deployed.version not in chosen:
            raise PlanUndecided("no plan was chosen on this machine yet")
        return load(bundle, deployed)

    def decide(bundle: Any) -> None:
        serving = careful.current
        assert (serving.version if serving else None) == (chosen[-1] if chosen else None)
        chosen.append(1 if not chosen else 2)

    careful = ModelSlot(ModelRef("digits", alias="champion"), models, undecided, decide)
    with pytest.raises(ModelNotReady, match="no plan was chosen"):
        careful.require()
    assert careful.refresh()
    deploy(2, seed=1)
    assert careful.require().champion.version == 1
    assert careful.refresh()
    assert (careful.require().champion.version, chosen) == (2, [1, 2])


def test_no_version_is_refused_if_both_versions_of_a_canary_are_new(
    models: Path, deploy_canary: Callable[..., tuple[Bundle, Bundle]]
) -> None:
    """Both plans have to be chosen, one after the other: the challenger is not at fault."""
    deploy_canary(share=0.5)
    chosen: set[int] = set()
    read: list[int] = []

    def undecided(bundle: Any, deployed: Any) -> Any:
        read.append(deployed.version)
        if deployed.version not in chosen:
            raise PlanUndecided("no plan was chosen on this machine yet")
        return load(bundle, deployed)

    def decide(bundle: Any) -> None:
        number = int(bundle.folder.name)
        before = list(read)
        for _ in range(5):  # polls meanwhile must not read the bundles again
            slot.poll_once()
            assert {each.refused for each in slot.workers()} == {None}
        assert read == before
        chosen.add(number)

    slot = ModelSlot(ModelRef("digits", alias="champion"), models, undecided, decide)
    slot.refresh()
    assert slot.require().champion.version == 1
    assert slot.require().challenger is None
    slot.refresh()
    assert slot.require().canary is not None
    assert (chosen, slot.error) == ({1, 2}, None)
    assert {each.refused for each in slot.workers()} == {None}


def test_a_plan_that_cannot_be_loaded_is_chosen_again_only_after_a_pause(
    models: Path, deploy: Callable[..., Bundle], clock: SimpleNamespace
) -> None:
    deploy(1)
    decided: list[Bundle] = []

    def never(bundle: Any, deployed: Any) -> NoReturn:
        raise PlanUndecided("the chosen plan is damaged")

    slot = ModelSlot(ModelRef("digits", alias="champion"), models, never, decided.append)
    for _ in range(5):
        assert not slot.refresh()
    assert len(decided) == 1
    clock.now += version_loader.RETRY_S
    slot.refresh()
    assert len(decided) == 2


def test_a_version_that_no_plan_can_serve_is_tried_again_after_growing_pauses(
    models: Path,
    deploy: Callable[..., Bundle],
    caplog: pytest.LogCaptureFixture,
    clock: SimpleNamespace,
) -> None:
    deploy(1)
    tried = []

    def never(bundle: Any, deployed: Any) -> NoReturn:
        raise PlanUndecided("nothing was chosen")

    def refuse(bundle: Any) -> None:
        tried.append(clock.now)
        raise BundleInvalid("no plan can serve it")

    slot = ModelSlot(ModelRef("digits", alias="champion"), models, never, refuse)

    def pauses(until: int) -> list[float]:
        """Seconds between the next ``until`` attempts."""
        tried.clear()
        while len(tried) < until:
            slot.refresh()
            clock.now += 5
        return [after - before for before, after in pairwise(tried)]

    assert pauses(until=10) == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    assert len([each for each in caplog.records if each.levelname == "WARNING"]) == 1
    deploy(2, seed=1)
    assert pauses(until=2) == [5]
