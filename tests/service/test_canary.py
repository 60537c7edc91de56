"""Canary and shadow: which requests the challenger answers, and which images it scores."""

import io
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import msgspec
import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from werkzeug.test import create_environ

from registry.canary.traffic_stats import ServingStatus
from registry.core.errors import DeviceLost, PlanUndecided
from registry.delivery.deployment import version_folder
from registry.model.bundle import WEIGHTS, Bundle
from registry.model.classifier import Classifier
from registry.model.plans.planner import Planner
from registry.model.plans.torch_eager import EAGER
from registry.model.refs import Canary, ModelRef
from service import create_app
from service.inference.traffic_split import routes_to_canary
from service.loading import version_loader
from service.loading.model_slot import ModelSlot
from service.observability.metrics import Metrics
from service.protocols.inference_app import CALLED
from service.server.protocol import IN_LOOP, Postpone
from service.settings import Settings
from service.shadow import process
from service.shadow.client import Sample, ShadowFeed
from service.shadow.process import CpuBudget, Shadow
from tests.conftest import WAIT_TIMEOUT_S, wait_for
from tests.service.conftest import Head, load
from training.data.sources import Dataset

RAW = {"content_type": "application/octet-stream"}


def versions(client: FlaskClient, images: list[bytes], **headers: str) -> list[int]:
    asked = [client.post("/v1/classify", data=each, headers=headers, **RAW) for each in images]
    assert {each.status_code for each in asked} == {200}
    return [each.get_json()["model"]["version"] for each in asked]


@pytest.fixture
def images(few_digits: Dataset) -> list[bytes]:
    return [few_digits.test.encode(position) for position in range(40)]


@given(st.binary(max_size=64), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_keeps_the_keys_of_a_smaller_one(key: bytes, one: float, two: float) -> None:
    small, large = (Canary(version=8, share=share) for share in sorted((one, two)))
    assert routes_to_canary(large, key) or not routes_to_canary(small, key)


def test_a_canary_gets_its_share_of_the_keys_and_other_keys_for_another_version() -> None:
    keys = [str(number).encode() for number in range(4000)]
    parts = [
        {key for key in keys if routes_to_canary(Canary(version=version, share=0.1), key)}
        for version in (8, 9)
    ]
    assert all(320 < len(part) < 480 for part in parts)
    assert len(parts[0] & parts[1]) < 100
    assert all(routes_to_canary(Canary(version=8, share=1.0), key) for key in keys)


def test_the_same_image_and_the_same_session_always_get_the_same_version(
    client: FlaskClient,
    slot: ModelSlot,
    deploy_canary: Callable[..., tuple[Bundle, Bundle]],
    images: list[bytes],
) -> None:
    deploy_canary(share=0.5)
    slot.refresh()
    first = versions(client, images)
    assert set(first) == {1, 2}
    assert versions(client, images) == first
    for session in ("a", "b", "c", "d"):
        assert len(set(versions(client, images[:5], **{"X-Session-Id": session}))) == 1
    headers = client.post("/v1/classify", data=images[0], **RAW).headers
    assert headers["X-Model-Version"] == str(first[0])


def test_a_client_can_ask_for_a_challenger_by_its_address(
    client: FlaskClient,
    slot: ModelSlot,
    deploy_canary: Callable[..., tuple[Bundle, Bundle]],
    png: bytes,
) -> None:
    deploy_canary(shadow=1.0)
    slot.refresh()
    for path, expected in (
        ("/v1/classify", 1),
        ("/v1/models/digits/versions/2/classify", 2),
        ("/v1/models/digits/aliases/challenger/classify", 2),
        ("/v1/models/digits/versions/1/classify", 1),
    ):
        assert client.post(path, data=png, **RAW).get_json()["model"]["version"] == expected
    missing = client.post("/v1/models/digits/versions/3/classify", data=png, **RAW)
    assert missing.status_code == 404
    assert (
        "this service has version 1, alias 'champion' and version 2" in missing.get_json()["detail"]
    )
    described = client.get("/v1/models/digits/versions/2").get_json()
    assert (described["version"], described["canary"]["shadow"]) == (2, 1.0)


def test_a_challenger_that_cannot_be_loaded_leaves_the_champion_alone(
    models: Path,
    deploy: Callable[..., Bundle],
    deploy_canary: Callable[..., tuple[Bundle, Bundle]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(version_loader, "RETRY_S", 0.0)
    slot = ModelSlot(ModelRef("digits", alias="champion"), models, load)
    deploy(1)
    slot.refresh()
    deploy_canary(share=0.5)
    weights = version_folder(models, "digits", 2) / WEIGHTS
    good = weights.read_bytes()
    weights.write_bytes(b"")
    slot.refresh()
    for each in (slot, ModelSlot(ModelRef("digits", alias="champion"), models, load)):
        each.refresh()  # the second slot starts with the broken challenger
        assert (each.require().champion.version, each.require().challenger) == (1, None)
        assert "has sha256" in str(each.error)
        assert each.workers()[0].refused == 2
        assert each.require().canary is None
    weights.write_bytes(good)
    slot.refresh()
    assert slot.require().canary == Canary(version=2, share=0.5)
    assert slot.error is None


def test_images_that_the_champion_answers_are_sent_to_the_shadow(
    client: FlaskClient,
    slot: ModelSlot,
    deploy_canary: Callable[..., tuple[Bundle, Bundle]],
    images: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[Sample] = []
    monkeypatch.setattr(ShadowFeed, "send", lambda feed, sample: sent.append(sample))
    deploy_canary(shadow=1.0)
    slot.refresh()
    answer = client.post("/v1/classify", data=images[0], **RAW).get_json()
    many = client.post(
        "/v1/classify",
        data={"image": [(io.BytesIO(each), "x.png") for each in (images[1], b"bad")]},
    ).get_json()
    assert "error" in many["results"][1]
    assert [each.index for each in sent] == [
        answer["predictions"][0]["index"],
        many["results"][0]["predictions"][0]["index"],
    ]
    assert {(each.model, each.challenger, each.is_encoded) for each in sent} == {
        ("digits", 2, False)
    }
    client.post("/v1/models/digits/versions/1/classify", data=images[0], **RAW)
    assert len(sent) == 2  # a request for a fixed version is not sampled


def test_a_sample_that_cannot_be_sent_at_once_is_dropped_and_counted(tmp_path: Path) -> None:
    dropped: list[int] = []
    address = tmp_path / "shadow"
    feed = ShadowFeed(address, lambda model, version, outcome, images: dropped.append(images))
    sample = Sample("digits", 2, 0, False, bytes(64))
    feed.send(sample)  # no process listens
    assert dropped == [1]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(address))
        feed.send(sample)
        assert process._receive(receiver) == [sample]
        for _ in range(500):
            feed.send(sample)
        assert len(dropped) > 100
        count = len(dropped)
        feed.send(Sample("digits", 2, 0, False, bytes(10_000_000)))
        assert len(dropped) == count + 1


def test_the_shadow_counts_agreement_and_counts_failures_against_the_challenger(
    models: Path, deploy_canary: Callable[..., tuple[Bundle, Bundle]], few_digits: Dataset
) -> None:
    deploy_canary(shadow=1.0)
    metrics = Metrics()
    settings = Settings(models_folder=models)
    scorer = Shadow(settings, Planner(Path("unused"), "cpu", None, EAGER), metrics)
    pixels = few_digits.test.pixels[0]
    scorer.score("digits", [Sample("digits", 2, 0, False, pixels.tobytes())])
    loaded = scorer._loaded["digits"]
    best = int(loaded.classifier.classify(pixels[None]).argmax())
    encoded = few_digits.test.encode(0)
    other = (best + 1) % 10
    for index, is_encoded, image in (
        (best, True, encoded),
        (best, False, pixels.tobytes()),
        (other, False, pixels.tobytes()),
        (best, True, b"no image"),
    ):
        scorer.score("digits", [Sample("digits", 2, index, is_encoded, image)])
    scorer.score("digits", [Sample("digits", 7, 0, False, pixels.tobytes())])  # another challenger
    (traffic,) = metrics.traffic("digits")
    first = int(best == 0)
    assert (traffic.agreed, traffic.differed, traffic.failed) == (2 + first, 2 - first, 1)
    assert traffic.agreement == pytest.approx((2 + first) / 5)


def test_the_shadow_rests_until_its_use_is_down_to_its_share_of_the_machine() -> None:
    used = iter([1.0, 1.2, 1.2])
    budget = CpuBudget(0.4, lambda: next(used))
    assert budget.rest_s() == pytest.approx(0.5)
    assert budget.rest_s() == 0


def test_the_service_reports_the_traffic_of_each_version(
    client: FlaskClient,
    slot: ModelSlot,
    deploy_canary: Callable[..., tuple[Bundle, Bundle]],
    images: list[bytes],
) -> None:
    deploy_canary(share=0.5)
    slot.refresh()
    answered = versions(client, images)
    client.post("/v1/models/digits/versions/2/classify", data=b"bad", **RAW)
    body = client.get("/v1/models/digits/traffic").get_json()
    assert (body["champion"], body["challenger"], body["generation"]) == (1, 2, 1)
    assert [each["version"] for each in body["workers"]] == [1]
    for each in body["versions"]:
        count = answered.count(each["version"])
        assert (each["requests"], each["images"], each["errors"]) == (count, count, 0)
        assert sum(number for _, number in each["buckets"]) == count
        assert 0.1 * count < each["confidence"] <= count


def test_a_service_without_a_canary_reports_its_traffic(ready: FlaskClient, png: bytes) -> None:
    ready.post("/v1/classify", data=png, **RAW)
    status = msgspec.json.decode(ready.get("/v1/models/digits/traffic").data, type=ServingStatus)
    assert (status.champion, status.challenger, status.of(1).requests) == (1, None, 1)
    assert status.of(9).requests == 0


class Switchable:
    """A classifier whose device can be lost."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self.lost = False
        self.device, self.plan = classifier.device, classifier.plan

    def check(self) -> None: ...

    def classify(self, pixels: Any) -> Any:
        if self.lost:
            raise DeviceLost("gone")
        return self._classifier.classify(pixels)


def test_the_champion_answers_until_a_challenger_whose_device_was_lost_is_loaded_again(
    models: Path,
    deploy_canary: Callable[..., tuple[Bundle, Bundle]],
    metrics: Metrics,
    settings: Settings,
    images: list[bytes],
) -> None:
    loaded: list[tuple[int, Switchable]] = []

    def switchable(bundle: Any, deployed: Any) -> Any:
        served = load(bundle, deployed, metrics)
        loaded.append((deployed.version, Switchable(served.classifier)))
        return replace(served, classifier=loaded[-1][1])

    deploy_canary(share=1.0)
    slot = ModelSlot(ModelRef("digits", alias="champion"), models, switchable)
    slot.refresh()
    client = create_app(settings, {"digits": slot}, metrics).test_client()
    assert set(versions(client, images[:4])) == {2}
    loaded[1][1].lost = True
    assert set(versions(client, images[:4])) == {1}
    slot.refresh()
    assert [version for version, _ in loaded] == [1, 2, 2]
    assert set(versions(client, images[:4])) == {2}
    assert slot.workers()[0].refused is None


def test_a_lost_device_does_not_count_as_a_refused_version(
    models: Path, deploy_canary: Callable[..., tuple[Bundle, Bundle]]
) -> None:
    def lost(bundle: Any, deployed: Any) -> NoReturn:
        raise DeviceLost("the process that owns the GPU is not running")

    deploy_canary(share=1.0)
    slot = ModelSlot(ModelRef("digits", alias="champion"), models, lost)
    slot.refresh()
    (report,) = slot.workers()
    assert "DeviceLost" in str(report.error)
    assert report.refused is None


def test_the_loop_postpones_requests_for_a_slow_challenger(
    app: Flask,
    slot: ModelSlot,
    deploy_canary: Callable[..., tuple[Bundle, Bundle]],
    images: list[bytes],
) -> None:
    """The loop answers all clients: probes and requests to the champion would wait as well."""
    deploy_canary(share=1.0)
    slot.refresh()
    challenger = slot.require().challenger
    assert challenger is not None
    challenger.batcher._image_ms = 200.0
    environ = create_environ("/v1/classify", method="POST", data=images[0])
    with pytest.raises(Postpone):
        app.wsgi_app(environ | {IN_LOOP: len(images[0])}, Head())
    one = "/v1/models/digits/versions/1/classify"
    environ = create_environ(one, method="POST", data=images[0])
    assert app.wsgi_app(environ | {IN_LOOP: len(images[0])}, Head())


def test_a_postponed_request_is_timed_from_its_arrival(
    app: Flask,
    slot: ModelSlot,
    deploy_canary: Callable[..., tuple[Bundle, Bundle]],
    images: list[bytes],
    metrics: Metrics,
) -> None:
    deploy_canary(share=0.0)
    slot.refresh()

    def ask(waited_s: float) -> tuple[str, dict[str, Any]]:
        head = Head()
        environ = create_environ("/v1/classify", method="POST", data=images[0])
        environ[CALLED] = time.perf_counter() - waited_s
        parts = app.wsgi_app(environ, head)
        body = b"".join(parts)
        return head.statuses[0], msgspec.json.decode(body)

    status, answer = ask(3.0)
    assert status == "200 OK"
    assert answer["timings_ms"]["total"] > 3000
    assert metrics.traffic("digits")[0].seconds > 3
    assert ask(11.0)[0].startswith("504")  # CONVOY_DEADLINE_S is 10


def test_metrics_clear_the_plan_of_a_version_whose_device_was_lost(metrics: Metrics) -> None:
    def served(device: str) -> Any:
        return SimpleNamespace(version=1, device=device, plan=f"plan-{device}")

    metrics.version_switched("digits", None, served("cuda:0"))
    # After a lost device, ``before`` is None.
    metrics.version_switched("digits", None, served("cpu"))
    text = metrics.render().decode()
    found = re.findall(r'convoy_model_info{device="([^"]+)".*} (.*)', text)
    assert sorted(found) == [("cpu", "1.0"), ("cuda:0", "0.0")]


def test_a_list_whose_images_fail_with_a_server_error_counts_as_an_error(
    client: FlaskClient,
    slot: ModelSlot,
    deploy_canary: Callable[..., tuple[Bundle, Bundle]],
    images: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deploy_canary(share=1.0)
    slot.refresh()
    challenger = slot.require().challenger
    assert challenger is not None
    monkeypatch.setattr(challenger.batcher, "wait", lambda queued_image: ArithmeticError("NaN"))
    parts = {"image": [(io.BytesIO(each), "x.png") for each in images[:2]]}
    answer = client.post("/v1/classify", data=parts).get_json()
    assert [each["error"]["status"] for each in answer["results"]] == [500, 500]
    of_champion, traffic = client.get("/v1/models/digits/traffic").get_json()["versions"]
    assert (traffic["version"], traffic["requests"], traffic["errors"]) == (2, 0, 1)
    assert (of_champion["requests"], of_champion["errors"]) == (0, 0)


def test_the_shadow_forgets_a_challenger_whose_device_was_lost(
    models: Path, deploy_canary: Callable[..., tuple[Bundle, Bundle]], few_digits: Dataset
) -> None:
    deploy_canary(shadow=1.0)
    metrics = Metrics()
    planner = Planner(Path("unused"), "cpu", None, EAGER)
    scorer = Shadow(Settings(models_folder=models), planner, metrics)
    sample = Sample("digits", 2, 0, False, few_digits.test.pixels[0].tobytes())
    scorer.score("digits", [sample])
    known = scorer._loaded["digits"]
    lost = Switchable(known.classifier)
    lost.lost = True
    scorer._loaded["digits"] = replace(known, classifier=lost)
    scorer.score("digits", [sample])
    assert metrics.traffic("digits")[0].failed == 0
    scorer.score("digits", [sample])
    assert metrics.traffic("digits")[0].shadowed == 2


def test_a_roll_back_does_not_wait_for_a_plan_that_is_being_chosen(
    models: Path, deploy: Callable[..., Bundle]
) -> None:
    deciding, go_on = threading.Event(), threading.Event()

    def undecided(bundle: Any, deployed: Any) -> Any:
        if deployed.version == 2:
            raise PlanUndecided("no plan was chosen")
        return load(bundle, deployed)

    def decide(bundle: Any) -> None:
        deciding.set()
        go_on.wait(WAIT_TIMEOUT_S)

    slot = ModelSlot(ModelRef("digits", alias="champion"), models, undecided, decide)
    deploy(1)
    stop = slot.start()
    try:
        deploy(2, seed=1)
        assert deciding.wait(WAIT_TIMEOUT_S)
        deploy(1)
        wait_for(lambda: slot.require().deployment.generation == 3)
        assert slot.require().champion.version == 1
    finally:
        go_on.set()
        stop.set()


def test_a_slot_recovers_from_a_lost_device_while_another_version_is_warm(
    models: Path, deploy: Callable[..., Bundle], metrics: Metrics
) -> None:
    loaded: list[Switchable] = []

    def switchable(bundle: Any, deployed: Any) -> Any:
        served = load(bundle, deployed, metrics)
        loaded.append(Switchable(served.classifier))
        return replace(served, classifier=loaded[-1])

    ref = ModelRef("digits", alias="champion")
    slot = ModelSlot(ref, models, switchable, keep_warm_s=600)
    for number in (1, 2):
        deploy(number, seed=number)
        assert slot.refresh()
    loaded[-1].lost = True
    assert slot.refresh()
    for number in (3, 4, 5):  # more than stay in memory
        deploy(number, seed=number)
        assert slot.refresh()
    assert slot.workers()[0].version == 5
