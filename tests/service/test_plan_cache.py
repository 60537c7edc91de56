"""An attacker who can write ``CONVOY_HOME/plans`` changes neither code that runs nor answers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from registry.core.errors import ModelNotReady, PlanUndecided
from registry.delivery.deployment import DeployedVersion, version_folder
from registry.delivery.signing import SIGNATURE, TrustedKeys, make_key, sign
from registry.model.bundle import Bundle
from registry.model.plans.planner import Planner, PlanSelection
from registry.model.plans.torch_eager import EAGER
from registry.model.refs import ModelRef, ModelVersion
from service.inference.loaded_model import ServedModel
from service.loading.model_slot import ModelSlot
from service.loading.open_slots import load_served
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.conftest import MakeBundle, load_eager

VERSION = DeployedVersion(version=3, manifest_sha256="", alias="champion")
FORGED = (
    "inductor-fp32",  # older versions of Convoy loaded a compiled package by this name
    "../../plans/evil",
    "registry.model.plans.benchmark_process",
    "cuda-fp16",  # a plan for another device
    "openvino-int8",  # the signed manifest has no accuracy for it
)


def options(planner: Planner, trust: TrustedKeys) -> dict[str, Any]:
    """The options of ``load_served`` in every worker of a service."""
    return {
        "name": "digits",
        "planner": planner,
        "settings": Settings(),
        "metrics": Metrics(),
        "trust": trust,
    }


@pytest.fixture
def signed(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Bundle, TrustedKeys]:
    """A version with a signature, and the keys that a service with CONVOY_TRUSTED_KEYS trusts."""
    bundle = make_bundle(folder=version_folder(tmp_path / "models", "digits", 3), export=True)
    key, trusted = tmp_path / "ann.pem", tmp_path / "trusted"
    trusted.write_text(f"{make_key(key)}  # ann's\n")
    monkeypatch.setenv("CONVOY_TRUSTED_KEYS", str(trusted))
    version = ModelVersion(
        name="digits",
        version=3,
        manifest_sha256=bundle.manifest_sha256,
        aliases=(),
        run_id="",
        created_unix_s=0.0,
    )
    (bundle.folder / SIGNATURE).write_text(sign(version, key, days=30))
    return bundle, TrustedKeys.from_environment()


@pytest.mark.slow
def test_answers_come_from_the_signed_bundle_whatever_lies_in_the_plan_cache(
    signed: tuple[Bundle, TrustedKeys], make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle, trust = signed
    unsigned = make_bundle(seed=1, export=True)
    plans = tmp_path / "plans"
    planner = Planner(plans, "cpu", 1)

    def load() -> ServedModel:
        return load_served(bundle, VERSION, **options(planner, trust))

    planner.choose(bundle)
    (entry,) = plans.glob("*.json")
    honest = entry.read_bytes()
    for folder in (plans, plans / entry.stem, plans / entry.stem / "artefacts"):
        folder.mkdir(exist_ok=True)
        for name in unsigned.serving_files():
            (folder / Path(name).name).write_bytes(unsigned.read(name))
        (folder / "package.pt2").write_bytes(b"\x7fELF")
    for name in FORGED:
        entry.write_bytes(msgspec.json.encode(PlanSelection(chosen=name, results=())))
        with pytest.raises(PlanUndecided):
            load()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    expected = load_eager(bundle).classify(pixels)
    assert np.abs(expected - load_eager(unsigned).classify(pixels)).max() > 0.1
    slower = msgspec.json.encode(PlanSelection(chosen=EAGER, results=()))
    for content in (honest, slower):
        entry.write_bytes(content)
        scores = load().classifier.classify(pixels)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=0.05)


def test_a_slots_error_about_a_plan_names_the_model_once(
    deploy: Callable[..., Bundle], models: Path, tmp_path: Path
) -> None:
    deploy(1)
    planner = Planner(tmp_path / "plans", "cpu", 1)
    slot = ModelSlot(
        ModelRef("digits", alias="champion"),
        models,
        partial(load_served, **options(planner, TrustedKeys({}))),
    )
    with pytest.raises(ModelNotReady) as raised:
        slot.require()
    assert str(raised.value) == "digits: no plan was chosen on this machine yet"
