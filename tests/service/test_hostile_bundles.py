"""Hostile and damaged bundles: the old version keeps serving, and none of their code runs."""

import base64
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from registry.core.errors import BundleInvalid
from registry.delivery.deployment import DeployedVersion, version_folder, write_deployment
from registry.delivery.signing import SIGNATURE, TrustedKeys, make_key, sign
from registry.model.bundle import Bundle, open_bundle
from registry.model.manifest import ListedNetwork
from registry.model.plans.planner import Planner
from registry.model.plans.torch_eager import EAGER
from registry.model.preprocessed_model import load_preprocessed
from registry.model.refs import ModelRef, ModelVersion
from service.loading.model_slot import ModelSlot
from service.loading.open_slots import load_served
from service.memory import rss_mb
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.conftest import MakeBundle
from tests.hostile_bundles import HOSTILE_BUNDLES, as_published
from tests.service.conftest import REF

# With digests that fit, these serve: a worker cannot detect them, or does not read the file.
HARMLESS = {
    "labels are swapped": "an attacker who can rewrite manifest and registry can do this: sign",
    "held-out scores are an array of objects": "only the gate reads them, and refuses them",
}


@pytest.fixture
def serving(slot: ModelSlot, deploy: Callable[..., Bundle]) -> ModelSlot:
    deploy(1)
    assert slot.refresh()
    return slot


def put_forward(models: Path, version: int, digest: str) -> None:
    write_deployment(
        models,
        REF,
        (DeployedVersion(version=version, manifest_sha256=digest, alias="champion"),),
    )


@pytest.mark.parametrize("name", HOSTILE_BUNDLES)
@pytest.mark.parametrize("digests_fit", [True, False])
def test_a_hostile_bundle_does_not_take_over_and_its_code_does_not_run(
    name: str,
    digests_fit: bool,
    serving: ModelSlot,
    make_bundle: MakeBundle,
    models: Path,
    tmp_path: Path,
) -> None:
    marker = tmp_path / "marker"
    bundle = make_bundle(seed=1, folder=version_folder(models, "digits", 2))
    before = bundle.manifest_sha256
    HOSTILE_BUNDLES[name](bundle, marker)
    put_forward(models, 2, as_published(bundle) if digests_fit else before)
    if name in HARMLESS and digests_fit:
        assert serving.refresh()
        assert not marker.exists()
        return
    assert not serving.refresh()
    assert serving.current is not None
    assert serving.current.version == 1
    assert serving.error
    assert not marker.exists()


@pytest.mark.parametrize("name", ["network would need 10¹⁶ bytes", "pictures of 4096×4096"])
def test_a_bundle_with_false_sizes_takes_no_memory(name: str, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(network=ListedNetwork("dense", {"hidden": [512]}))
    HOSTILE_BUNDLES[name](bundle, Path("unused"))
    before = rss_mb()
    with pytest.raises(BundleInvalid, match="do not fit"):
        load_preprocessed(open_bundle(bundle.folder))
    assert rss_mb() - before < 50


def test_reading_an_array_of_objects_is_refused(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle()
    HOSTILE_BUNDLES["held-out scores are an array of objects"](bundle, tmp_path / "marker")
    changed = open_bundle(bundle.folder)
    with pytest.raises(BundleInvalid):
        changed.heldout()
    assert not (tmp_path / "marker").exists()


def test_a_bundle_with_one_changed_bit_never_takes_over(
    serving: ModelSlot, make_bundle: MakeBundle, models: Path, clock: SimpleNamespace
) -> None:
    bundle = make_bundle(seed=1, folder=version_folder(models, "digits", 2))
    files = [bundle.folder / name for name in (*bundle.serving_files(), "manifest.json")]
    dice = random.Random(0)
    for _ in range(60):
        file = dice.choice(files)
        good = file.read_bytes()
        at = dice.randrange(len(good))
        file.write_bytes(good[:at] + bytes([good[at] ^ (1 << dice.randrange(8))]) + good[at + 1 :])
        clock.now += 600  # longer than any pause before a retry
        put_forward(models, 2, bundle.manifest_sha256)
        assert not serving.refresh()
        assert serving.current is not None
        assert serving.current.version == 1
        file.write_bytes(good)
    clock.now += 600
    assert serving.refresh()  # without a change, the bundle is good


@pytest.mark.parametrize("signed", [True, False])
def test_a_bundle_of_another_model_is_refused_even_if_it_is_signed(
    make_bundle: MakeBundle, models: Path, tmp_path: Path, signed: bool
) -> None:
    bundle = make_bundle(folder=version_folder(models, "letters", 1))  # a bundle of "digits"
    key = tmp_path / "ann.pem"
    public = base64.b64decode(make_key(key).split()[1])
    digits = ModelVersion(
        name="digits",
        version=1,
        manifest_sha256=bundle.manifest_sha256,
        aliases=(),
        run_id="",
        created_unix_s=0.0,
    )
    (bundle.folder / SIGNATURE).write_text(sign(digits, key, days=1))
    deployed = DeployedVersion(version=1, manifest_sha256=bundle.manifest_sha256, alias="champion")
    letters = ModelRef("letters", alias="champion")
    write_deployment(models, letters, (deployed,))
    load = partial(
        load_served,
        name="letters",
        planner=Planner(tmp_path / "plans", "cpu", None, EAGER),
        settings=Settings(),
        metrics=Metrics(),
        trust=TrustedKeys({"ann": public} if signed else {}),
    )
    slot = ModelSlot(letters, models, load)
    assert not slot.refresh()
    assert slot.error is not None
    assert "belongs to the model 'digits'" in slot.error
