from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy
import torch

from registry.core.errors import BundleInvalid
from registry.model.bundle import GOLDEN, WEIGHTS, Bundle, GoldenImage, write_bundle
from registry.model.classifier import LARGEST_BATCH
from registry.model.manifest import ListedNetwork
from registry.model.plans.planner import Planner
from registry.model.plans.torch_eager import EAGER
from tests.conftest import MakeBundle, load_eager
from training.data.sources import Dataset


def rewritten(bundle: Bundle, folder: Path, **files: bytes) -> Bundle:
    """``bundle`` with other content under valid digests, which only a replay can detect."""
    kept = {name: bundle.read(name) for name in bundle.manifest.files}
    named = {"weights": WEIGHTS, "golden": GOLDEN}
    return write_bundle(
        folder, bundle.manifest, {**kept, **{named[k]: v for k, v in files.items()}}
    )


def test_rows_are_probabilities_and_do_not_depend_on_the_batch(
    make_bundle: MakeBundle, digits: Dataset
) -> None:
    classifier = load_eager(make_bundle())
    pixels = digits.train.pixels[: LARGEST_BATCH + 7]
    scores = classifier.classify(pixels)
    assert scores.dtype == np.float32
    assert scores.shape == (LARGEST_BATCH + 7, 10)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(scores[3:4], classifier.classify(pixels[3:4]), atol=1e-6)
    assert classifier.device == "cpu"


def test_weights_of_another_network_are_refused(make_bundle: MakeBundle) -> None:
    def other(manifest: Any) -> Any:
        return msgspec.structs.replace(manifest, network=ListedNetwork("cnn", {"padding": 1}))

    with pytest.raises(BundleInvalid, match="do not fit its network"):
        load_eager(make_bundle(change=other))


def test_a_network_that_is_not_on_our_list_is_refused(make_bundle: MakeBundle) -> None:
    def other(manifest: Any) -> Any:
        return msgspec.structs.replace(manifest, network=ListedNetwork("os.system"))

    with pytest.raises(BundleInvalid, match="there is no network"):
        load_eager(make_bundle(change=other))


def test_weights_that_give_other_scores_are_refused(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    first, second = make_bundle(seed=0), make_bundle(seed=1)
    version_switched = rewritten(first, tmp_path / "swapped", weights=second.read(WEIGHTS))
    with pytest.raises(BundleInvalid, match=r"differs by .* its tolerance in fp32 is 0\.001"):
        load_eager(version_switched)


def test_weights_of_nan_are_refused(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle()
    state = {name: np.full_like(array, np.nan) for name, array in bundle.weights().items()}
    broken = rewritten(bundle, tmp_path / "nan", weights=safetensors.numpy.save(state))
    with pytest.raises(BundleInvalid, match="NaN"):
        load_eager(broken)


@pytest.mark.parametrize(
    ("golden", "reason"),
    [
        ([], "no golden images"),
        ([GoldenImage(WEIGHTS, (0.1,) * 10)], "a golden image: the body is not"),
        (None, "have 3 probabilities"),
    ],
)
def test_golden_images_that_prove_nothing_are_refused(
    make_bundle: MakeBundle, tmp_path: Path, golden: list[GoldenImage] | None, reason: str
) -> None:
    bundle = make_bundle()
    if golden is None:
        golden = [GoldenImage(each.file, (1.0, 0.0, 0.0)) for each in bundle.golden()]
    broken = rewritten(bundle, tmp_path / "broken", golden=msgspec.json.encode(golden))
    with pytest.raises(BundleInvalid, match=reason):
        load_eager(broken)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA")
def test_the_gpu_agrees_with_the_golden_images(make_bundle: MakeBundle) -> None:
    planner = Planner(Path("unused"), "cuda:0", None, EAGER)
    assert planner.load(make_bundle()).device.startswith("cuda")
