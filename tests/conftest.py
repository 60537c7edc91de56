"""Fixtures that the tests share: tiny seeded networks, real pictures, and an own home folder."""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Set before torch and OpenVINO are imported, because two test processes share the cores. Every
# process that a test starts inherits it.
os.environ["OMP_NUM_THREADS"] = "1"

import msgspec
import numpy as np
import pytest
import torch

from benchmarks.common import free_port as free_port
from registry.core.paths import Paths, convoy_paths
from registry.model.bundle import Bundle
from registry.model.classifier import Classifier
from registry.model.manifest import ListedNetwork, Manifest
from registry.model.plans.planner import Planner
from registry.model.plans.torch_eager import EAGER, eager_classifier
from registry.model.preprocessed_model import PreprocessedModel, build_preprocessed
from registry.model.refs import ModelVersion
from training.data.sources import Dataset, load_dataset, take
from training.fitting.recipes import Recipe
from training.publishing.evaluate import evaluate
from training.publishing.export import export_network
from training.publishing.publish import build_manifest, choose_calibration, write_version

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from registry.store.mlflow_store import ModelStore

MakeBundle = Callable[..., Bundle]
Publish = Callable[..., ModelVersion]
NewPage = Callable[..., tuple["Page", list[str]]]
CPU = torch.device("cpu")
WAIT_TIMEOUT_S = 300.0
"""How long a test waits for an event. Generous, because a busy machine may be ten times slower."""


def wait_for(condition: Callable[[], object], what: str = "it did not happen in time") -> None:
    """Return once ``condition()`` is true; fail with the message ``what`` after the timeout."""
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` fills once for all processes of this test run.

    The first process fills it; the others wait for it.
    """
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    shared = factory.getbasetemp().parent if is_worker else factory.getbasetemp()
    folder = shared / f"once-{name}"
    done = shared / f"once-{name}.done"
    with (shared / f"once-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            forget_registry()
            make(folder)
            forget_registry()
            done.touch()
    return folder


def forget_registry() -> None:
    """Remove the last registry, which MLflow writes into the environment, for good."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Start every test with its own home folder, and without variables of the services."""
    forget_registry()  # ``monkeypatch`` would bring it back after the test
    for name in list(os.environ):
        if name.startswith(("CONVOY_", "OTEL_")) or name == "MLFLOW_REGISTRY_URI":
            monkeypatch.delenv(name)
    monkeypatch.setenv("CONVOY_HOME", str(tmp_path / "home"))
    yield
    forget_registry()


@pytest.fixture
def paths() -> Paths:
    return convoy_paths()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """All 1,797 digits."""
    return load_dataset("digits", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def few_digits(digits: Dataset) -> Dataset:
    """A few hundred digits, so that an epoch takes milliseconds."""
    return msgspec.structs.replace(
        digits,
        train=take(digits.train, np.arange(256)),
        validation=take(digits.validation, np.arange(64)),
        test=take(digits.test, np.arange(64)),
    )


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        name="tiny",
        network=ListedNetwork("cnn", {"filters": [4], "hidden": 16}),
        epochs=2,
        batch_size=32,
        learning_rate=0.01,
    )


SSE = frozenset({"sse4_2"})
AVX2 = SSE | {"avx2"}
VNNI = AVX2 | {"avx512f", "avx512bw", "avx512_vnni"}
CPU_KINDS = {
    "none": SSE,
    "AVX2": AVX2,
    "AVX512-VNNI": VNNI,
    "AMX": VNNI | {"avx512_bf16", "amx_bf16", "amx_int8"},
    "ARM": frozenset({"asimd", "asimddp", "bf16"}),
}


@pytest.fixture(params=CPU_KINDS)
def cpu_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a kind of CPU. During the test, this machine reports the flags of that kind."""
    kind: str = request.param
    monkeypatch.setattr("registry.core.devices.cpu_flags", lambda: CPU_KINDS[kind])
    return kind


@pytest.fixture
def cpu_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report the flags of a CPU with kernels in every precision, so that every plan is tried."""
    monkeypatch.setattr("registry.core.devices.cpu_flags", lambda: CPU_KINDS["AMX"])


TINY = ListedNetwork("dense", {"hidden": [8]})


def tiny_model(data: Dataset, seed: int = 0, network: ListedNetwork = TINY) -> PreprocessedModel:
    """An untrained network with seeded weights."""
    torch.manual_seed(seed)
    return build_preprocessed(network, data.preprocess, len(data.labels)).eval()


def load_eager(bundle: Bundle) -> Classifier:
    """The classifier of ``bundle`` with ``torch-eager``, which needs no benchmark and no cache."""
    return Planner(Path("unused"), "cpu", None, EAGER).load(bundle)


def exported(
    factory: pytest.TempPathFactory, preprocessed: PreprocessedModel, data: Dataset
) -> dict[str, bytes]:
    """The files of ``export_network``, made once for all processes because that takes seconds."""
    weights = [tensor.numpy().tobytes() for tensor in preprocessed.network.state_dict().values()]
    key = hashlib.sha256(b"".join([data.sha256.encode(), str(preprocessed).encode(), *weights]))

    def make(folder: Path) -> None:
        for name, content in export_network(preprocessed, choose_calibration(data.train)).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    folder = made_once(factory, f"exports-{key.hexdigest()[:16]}", make)
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def make_bundle(
    few_digits: Dataset, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> MakeBundle:
    """A function that writes a real bundle: ``make_bundle(seed=1, change=lambda manifest: …)``.

    ``export=True`` adds graphs for other engines than torch, which takes seconds.
    """

    def make(
        seed: int = 0,
        folder: Path | None = None,
        data: Dataset = few_digits,
        change: Callable[[Manifest], Manifest] = lambda manifest: manifest,
        network: ListedNetwork = TINY,
        export: bool = False,
    ) -> Bundle:
        spec, preprocessed = network, tiny_model(data, seed, network)
        heldout = evaluate(eager_classifier(preprocessed, "cpu"), data.validation)
        tiny = Recipe(name="tiny", network=spec, epochs=1)
        manifest = build_manifest("digits", tiny, data, seed, "cpu", heldout.metrics("validation"))
        report = tmp_path / "report"
        report.mkdir(exist_ok=True)
        (report / "report.html").write_text("<title>report</title>")
        # The store requires this folder name.
        target = folder or tmp_path / f"version-{seed}" / "bundle"
        exports = exported(tmp_path_factory, preprocessed, data) if export else {}
        return write_version(target, change(manifest), preprocessed, data, heldout, report, exports)

    return make


@pytest.fixture
def png(few_digits: Dataset) -> bytes:
    """An encoded picture that the tiny networks can classify."""
    return few_digits.test.encode(0)


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, made once because that takes seconds."""

    def make(root: Path) -> None:
        from registry.store.mlflow_store import ModelStore

        ModelStore(Paths(root)).models()

    return made_once(tmp_path_factory, "registry", make) / "mlflow.db"


@pytest.fixture
def registry_paths(paths: Paths, empty_registry: Path) -> Iterator[Paths]:
    """The paths of a home folder with an empty registry."""
    paths.root.mkdir(parents=True)
    shutil.copy(empty_registry, paths.root / "mlflow.db")
    yield paths
    import mlflow

    while mlflow.active_run() is not None:
        mlflow.end_run()


@pytest.fixture
def store(registry_paths: Paths) -> "ModelStore":
    """An empty registry, which is also that of MLflow's own functions."""
    import mlflow

    from registry.store.mlflow_store import ModelStore

    found = ModelStore(registry_paths)
    mlflow.set_tracking_uri(found.connection.uri)
    return found


@pytest.fixture
def downloads(store: "ModelStore", monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of each version that is downloaded, once for each download."""
    found: list[int] = []
    download = store.download

    def counted(version: ModelVersion, *arguments: Any) -> Bundle:
        found.append(version.version)
        return download(version, *arguments)

    monkeypatch.setattr(store, "download", counted)
    return found


@pytest.fixture
def publish(store: "ModelStore", make_bundle: MakeBundle) -> Publish:
    """A function that registers a version: ``publish(seed=1)`` returns its ``ModelVersion``."""
    from training.publishing.tracking import start_run

    def register(seed: int = 0, **options: Any) -> ModelVersion:
        bundle = make_bundle(seed=seed, **options)
        with start_run(store, "convoy", f"seed {seed}"):
            return store.publish(bundle, {"convoy.recipe": "tiny"})

    return register


@pytest.fixture
def better_and_worse_seed(make_bundle: MakeBundle) -> tuple[int, int]:
    """Seeds of two tiny networks. The first one classifies more held-out pictures correctly."""
    scores = {}
    for seed in range(6):
        heldout = make_bundle(seed=seed).heldout()
        scores[seed] = int((heldout.probabilities.argmax(1) == heldout.labels).sum())
    better, worse = max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)
    assert scores[better] > scores[worse]
    return better, worse


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def browser() -> Iterator["Browser"]:
    """A headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("this machine has no Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def new_page(browser: "Browser") -> NewPage:
    """Opens a page: ``new_page(viewport=…)`` gives it and the list of the faults that it reports.

    A fault is an error of a script, or one in the console: a violation of the page's policy, too.
    """

    def open_page(**options: Any) -> tuple["Page", list[str]]:
        page = browser.new_context(**options).new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        return page, faults

    return open_page


@pytest.fixture
def watched_page(new_page: NewPage) -> tuple["Page", list[str]]:
    """A page, and the list of the faults that it reports."""
    return new_page()
