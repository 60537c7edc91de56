"""The server of the process that owns the GPU, run in this process on a stand-in for the device."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Listener, Pipe
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from registry.core.errors import BundleInvalid, DeviceLost, ModelNotReady, PlanUndecided
from registry.delivery.signing import TrustedKeys
from registry.model.bundle import Bundle
from registry.model.classifier import Classifier
from registry.model.plans.base import PredictFn
from registry.model.plans.planner import Planner
from registry.model.plans.torch_eager import EAGER
from registry.model.refs import ModelRef
from service import create_app
from service.loading import gpu_client, gpu_process
from service.loading.gpu_client import GpuPlanner, RemotePredict
from service.loading.gpu_process import GpuModel, GpuServer, _answer
from service.loading.model_slot import ModelSlot
from service.loading.open_slots import load_served
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.conftest import WAIT_TIMEOUT_S, MakeBundle, load_eager, wait_for
from tests.stand_in_gpu import DEVICE, PLAN, StandInPlanner
from training.data.sources import Dataset

SETTINGS = Settings(max_batch=8, queue_limit=64, max_batch_compute_ms=1e6)


class Owner:
    """A server on a socket with a stand-in planner, and a client with one for the CPU."""

    def __init__(self, address: Path, planner: StandInPlanner, device: str = "cuda:0") -> None:
        self.planner = planner
        self.server = GpuServer(planner, device, SETTINGS)
        self.listener = Listener(str(address), "AF_UNIX", backlog=16)
        self.on_cpu = StandInPlanner()
        self.client = GpuPlanner(address, self.on_cpu)
        Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed by the test
            self.server.serve(self.listener)


@pytest.fixture
def own() -> Iterator[Callable[..., Owner]]:
    """Starts owners: ``own(wrap=…, device=…)``."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's are too long for a socket
        owners: list[Owner] = []

        def start(
            wrap: Callable[[PredictFn], PredictFn] = lambda run: run, device: str = "cuda:0"
        ) -> Owner:
            address = Path(folder) / str(len(owners))
            owners.append(Owner(address, StandInPlanner(wrap), device))
            return owners[-1]

        yield start
        for owner in owners:
            owner.listener.close()


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statuses with which the process would have ended."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    return statuses


def test_the_scores_are_those_of_the_same_plan_in_the_worker(
    own: Callable[..., Owner], make_bundle: MakeBundle, few_digits: Dataset
) -> None:
    bundle = make_bundle()
    remote = own().client.load(bundle)
    assert (remote.device, remote.plan) == (DEVICE, PLAN)
    expected = load_eager(bundle)
    for size in (1, 8, 20):  # the last in several batches
        pixels = few_digits.test.pixels[:size]
        scores = remote.classify(pixels)
        assert (scores.dtype, scores.shape) == (np.dtype(np.float32), (size, 10))
        np.testing.assert_allclose(scores, expected.classify(pixels), atol=1e-6)


def test_a_version_is_loaded_once_for_all_workers_and_freed_by_the_last(
    own: Callable[..., Owner], make_bundle: MakeBundle
) -> None:
    owner, bundle = own(), make_bundle()
    workers = [owner.client.load(bundle), owner.client.load(bundle)]
    assert owner.planner.loads == 1
    workers.pop()
    assert owner.server._loaded
    workers.pop()
    wait_for(lambda: not owner.server._loaded)
    owner.client.load(bundle)
    assert owner.planner.loads == 2


def test_the_watch_for_hangs_does_not_keep_a_version_alive(
    own: Callable[..., Owner], make_bundle: MakeBundle
) -> None:
    owner = own()
    remote = owner.client.load(make_bundle())
    owner.server._end_if_hung()
    assert len(owner.server._loaded) == 1
    del remote
    wait_for(lambda: not owner.server._loaded)


def test_a_load_that_hangs_ends_the_owner(
    own: Callable[..., Owner],
    make_bundle: MakeBundle,
    exits: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, bundle, go_on = own(), make_bundle(), Event()
    monkeypatch.setattr(owner.planner, "load", lambda bundle: go_on.wait(WAIT_TIMEOUT_S))
    for module in (gpu_client, gpu_process):
        monkeypatch.setattr(module, "LOAD_S", 0.05)
    with pytest.raises(DeviceLost):
        owner.client.load(bundle)

    def has_ended() -> bool:
        owner.server._end_if_hung()
        return exits != []

    wait_for(has_ended)
    assert set(exits) == {gpu_process.DEVICE_LOST}
    go_on.set()


def test_images_of_several_workers_share_a_batch(
    own: Callable[..., Owner], make_bundle: MakeBundle, few_digits: Dataset
) -> None:
    sizes: list[int] = []
    busy, go_on = Event(), Event()

    def slow(run: PredictFn) -> PredictFn:
        def classify(pixels: Any) -> Any:
            sizes.append(len(pixels))
            busy.set()
            assert go_on.wait(WAIT_TIMEOUT_S)
            return run(pixels)

        return classify

    owner, bundle = own(slow), make_bundle()
    workers = [owner.client.load(bundle) for _ in range(3)]
    threads = [
        Thread(target=worker.classify, args=(few_digits.test.pixels[:count],))
        for worker, count in zip(workers, (1, 2, 3), strict=True)
    ]
    threads[0].start()
    assert busy.wait(WAIT_TIMEOUT_S)
    for thread in threads[1:]:
        thread.start()
    batcher = owner.server._loaded[bundle.manifest_sha256].batcher
    wait_for(lambda: batcher.depth == 5)
    go_on.set()
    for thread in threads:
        thread.join()
    assert sizes == [1, 5]


def test_errors_reach_the_worker_with_their_class_and_text(
    own: Callable[..., Owner],
    make_bundle: MakeBundle,
    few_digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, bundle = own(), make_bundle()

    def fail(error: Exception) -> Callable[[Bundle], None]:
        def load(bundle: Bundle) -> None:
            raise error

        return load

    for error in (PlanUndecided("not yet"), BundleInvalid("scores NaN")):
        monkeypatch.setattr(owner.planner, "load", fail(error))
        with pytest.raises(type(error), match=str(error)):
            owner.client.load(bundle)
    monkeypatch.setattr(owner.planner, "load", fail(OSError(28, "No space left on device")))
    with pytest.raises(RuntimeError, match=r"OSError: .* No space left on device"):
        owner.client.load(bundle)
    assert not owner.server._loaded


def test_a_bad_image_fails_alone_and_the_connection_lives_on(
    own: Callable[..., Owner], make_bundle: MakeBundle, few_digits: Dataset
) -> None:
    def picky(run: PredictFn) -> PredictFn:
        def classify(pixels: Any) -> Any:
            if not pixels.any(axis=(1, 2, 3)).all():
                raise ValueError("a black image")
            return run(pixels)

        return classify

    remote = own(picky).client.load(make_bundle())
    good = few_digits.test.pixels[:1]
    with pytest.raises(RuntimeError, match="ValueError: a black image"):
        remote.classify(np.zeros_like(good))
    assert remote.classify(good).shape == (1, 10)
    features = remote.predict(good).features
    assert features is not None
    assert features.shape == (1, 8)
    assert not remote.lost


def test_the_owner_chooses_plans(own: Callable[..., Owner], make_bundle: MakeBundle) -> None:
    owner, bundle = own(), make_bundle()
    owner.client.choose(bundle)
    assert owner.planner.chosen == [bundle.manifest_sha256]
    assert owner.on_cpu.chosen == []


def test_without_a_gpu_workers_choose_and_load_plans_themselves(
    own: Callable[..., Owner], make_bundle: MakeBundle
) -> None:
    owner, bundle = own(device="cpu"), make_bundle()
    owner.client.choose(bundle)
    owner.client.load(bundle)
    assert (owner.planner.chosen, owner.planner.loads) == ([], 0)
    assert (owner.on_cpu.chosen, owner.on_cpu.loads) == ([bundle.manifest_sha256], 1)


def test_an_owner_that_is_not_running_is_a_lost_device(
    tmp_path: Path, make_bundle: MakeBundle
) -> None:
    client = GpuPlanner(tmp_path / "unknown", StandInPlanner())
    with pytest.raises(DeviceLost, match="is not running"):
        client.load(make_bundle())


def test_an_owner_that_hangs_is_a_lost_device(
    own: Callable[..., Owner],
    make_bundle: MakeBundle,
    few_digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = Event()
    remote = own(lambda run: lambda pixels: go_on.wait(WAIT_TIMEOUT_S) and run(pixels)).client.load(
        make_bundle()
    )
    monkeypatch.setattr(gpu_client, "ANSWER_S", 0.05)
    with pytest.raises(DeviceLost, match=r"did not answer in 0\.05 s"):
        remote.classify(few_digits.test.pixels[:1])
    assert remote.lost
    go_on.set()
    with pytest.raises(DeviceLost):  # the late answer must not pass for that of another image
        remote.classify(few_digits.test.pixels[1:2])


def test_an_owner_that_does_not_read_is_a_lost_device(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_client, "ANSWER_S", 0.05)
    near, far = Pipe()  # two Unix sockets; no thread reads from ``far``
    run = RemotePredict(near, 10)
    with pytest.raises(DeviceLost, match="has ended"):
        run(np.zeros((64, 224, 224, 3), dtype=np.uint8))
    assert run.is_lost()
    far.close()


def test_a_forward_pass_that_hangs_ends_the_owner(
    own: Callable[..., Owner],
    make_bundle: MakeBundle,
    few_digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended, go_on = Event(), Event()

    def exit_(status: int) -> None:
        assert status == gpu_process.DEVICE_LOST
        ended.set()

    monkeypatch.setattr(os, "_exit", exit_)
    monkeypatch.setattr(gpu_process, "PASS_S", 0.05)
    remote = own(lambda run: lambda pixels: go_on.wait(WAIT_TIMEOUT_S) and run(pixels)).client.load(
        make_bundle()
    )
    asking = Thread(target=remote.classify, args=(few_digits.test.pixels[:1],))
    asking.start()
    assert ended.wait(WAIT_TIMEOUT_S)
    go_on.set()
    asking.join()


def test_the_owner_refuses_no_image_of_many_workers(
    own: Callable[..., Owner], make_bundle: MakeBundle, few_digits: Dataset
) -> None:
    owner, bundle = own(), make_bundle()
    failures: list[Exception] = []

    def work(remote: Classifier) -> None:
        try:
            for _ in range(3):
                remote.classify(few_digits.test.pixels[:32])
        except Exception as error:  # noqa: BLE001 - what the test is about
            failures.append(error)

    threads = [Thread(target=work, args=(owner.client.load(bundle),)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_owner_refuses_no_image_because_the_device_is_slow(
    make_bundle: MakeBundle, few_digits: Dataset
) -> None:
    """Workers refuse images that would wait too long; here a refusal would look like a fault."""
    planner = Planner(Path("unused"), "cpu", None, EAGER)
    loaded = GpuModel(planner.load(make_bundle()), 32, 50.0)
    loaded.batcher._image_ms = 60_000.0
    pixels = few_digits.test.pixels[:3]
    assert len(_answer(loaded, pixels)) > 3 * 10 * 4
    assert len(_answer(loaded, pixels)) > 3 * 10 * 4


def test_an_owner_that_loads_for_too_long_is_a_lost_device(
    own: Callable[..., Owner], make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, go_on = own(), Event()
    monkeypatch.setattr(owner.planner, "load", lambda bundle: go_on.wait(WAIT_TIMEOUT_S))
    monkeypatch.setattr(gpu_client, "LOAD_S", 0.05)
    with pytest.raises(DeviceLost, match="did not load a plan"):
        owner.client.load(make_bundle())
    go_on.set()


def test_a_malformed_message_ends_only_its_own_connection(
    own: Callable[..., Owner], make_bundle: MakeBundle
) -> None:
    owner = own()
    with Client(str(owner.client._address), "AF_UNIX") as stranger:
        stranger.send_bytes(b"{")
        with pytest.raises(EOFError):
            stranger.recv_bytes()
    assert owner.client.load(make_bundle()).plan == PLAN


def test_a_lost_device_ends_the_owner_and_the_model_is_not_ready_until_another_runs(
    own: Callable[..., Owner],
    deploy: Callable[..., Bundle],
    models: Path,
    png: bytes,
    exits: list[int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lose = Event()

    def losable(run: PredictFn) -> PredictFn:
        def classify(pixels: Any) -> Any:
            if lose.is_set():
                raise DeviceLost("CUDA error: an illegal memory access was encountered")
            return run(pixels)

        return classify

    owner, metrics = own(losable), Metrics()

    def load(bundle: Any, deployed: Any) -> Any:
        return load_served(
            bundle,
            deployed,
            name=bundle.manifest.model,
            planner=owner.client,
            settings=SETTINGS,
            metrics=metrics,
            trust=TrustedKeys({}),
        )

    slot = ModelSlot(
        ModelRef("digits", alias="champion"), models, load, on_switch=metrics.version_switched
    )
    deploy(1)
    assert slot.refresh()
    client = create_app(SETTINGS, {"digits": slot}, metrics).test_client()
    assert client.post("/v1/classify", data=png).status_code == 200
    assert client.get("/readyz").get_json()["models"][0]["device"] == DEVICE

    lose.set()
    refused = client.post("/v1/classify", data=png)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "2")
    assert exits == [gpu_process.DEVICE_LOST]
    assert client.get("/readyz").status_code == 503
    with pytest.raises(ModelNotReady, match="device was lost"):
        slot.require()

    owner.listener.close()
    monkeypatch.setattr("service.loading.version_loader.RETRY_S", 0.0)
    assert not slot.refresh()
    assert "is not running" in str(slot.error)
    owner.client._address = own(device="cpu").client._address  # the next owner finds no GPU
    assert slot.refresh()
    assert client.post("/v1/classify", data=png).status_code == 200
    (ready,) = client.get("/readyz").get_json()["models"]
    assert (ready["version"], ready["error"]) == (1, None)
    errors = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
    assert [text.partition(":")[0] for text in errors] == ["the GPU was lost", "digits"]
