"""Publishes a trained model as a version, after it has read the bundle back and checked it."""

import importlib.metadata
import logging
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from itertools import islice, zip_longest
from pathlib import Path

import msgspec
import numpy as np
import safetensors.torch
from msgspec.structs import replace
from numpy.typing import NDArray

from registry.core.errors import BundleInvalid
from registry.model.bundle import (
    GOLDEN,
    THUMBNAILS,
    WEIGHTS,
    Bundle,
    GoldenImage,
    to_npz,
    write_bundle,
)
from registry.model.classifier import replay_golden
from registry.model.image.decode import Pixels, decode_image
from registry.model.image.limits import TRUSTED_LIMITS
from registry.model.manifest import SCHEMA_VERSION, DataRecord, Manifest, SourceRecord
from registry.model.plans.base import PlanContext, find_plan
from registry.model.plans.torch_eager import EAGER, eager_classifier
from registry.model.preprocessed_model import PreprocessedModel
from registry.model.refs import ModelVersion
from registry.store.mlflow_store import ModelStore
from training.data.sources import Dataset, Examples
from training.fitting.recipes import Recipe
from training.publishing.evaluate import Evaluation
from training.publishing.export import export_network
from training.publishing.plan_accuracy import record_plan_accuracy
from training.publishing.records import ChampionScores, example_files, score_champion

log = logging.getLogger(__name__)

GOLDEN_IMAGES = 32
CALIBRATION_IMAGES = 256
CALIBRATION_SIZE_BYTES = 16_000_000
THUMBNAIL_PX = 64
THUMBNAILS_SIZE_BYTES = 32_000_000
GOLDEN_SIZE_BYTES = 512_000  # larger pictures only if a class has no smaller ones
# Both scores come from the same network on the same device; only the batches differ.
RESCORE_TOLERANCE = 1e-4
RECORDED_PACKAGES = ("torch", "numpy", "pillow", "safetensors", "msgspec")


def build_manifest(
    model: str, recipe: Recipe, data: Dataset, seed: int, device: str, metrics: dict[str, float]
) -> Manifest:
    """The manifest of a version that is about to be written; it does not list files yet."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=model,
        network=recipe.network,
        labels=data.labels,
        preprocess=data.preprocess,
        metrics=metrics,
        data=DataRecord(
            name=data.name,
            sha256=data.sha256,
            counts=data.counts,
        ),
        source=SourceRecord(
            recipe=recipe.name,
            seed=seed,
            device=device,
            git_commit=_git_commit(),
            versions={
                "python": platform.python_version(),
                **{name: public_version(name) for name in RECORDED_PACKAGES},
            },
        ),
    )


def publish(
    store: ModelStore,
    manifest: Manifest,
    preprocessed: PreprocessedModel,
    data: Dataset,
    heldout: Evaluation,
    report: Path,
    device: str,
) -> ModelVersion:
    """Write the bundle, verify it, and register it as the next version, alias ``challenger``.

    Args:
        store: the registry; an MLflow run must be active.
        manifest: from ``build_manifest``.
        preprocessed: the model with the weights to publish.
        data: for the golden images and the verification.
        heldout: the scores of ``data.validation`` that training computed.
        report: folder with the report, which is copied into the bundle.
        device: where to verify the bundle.

    Raises:
        BundleInvalid: the bundle does not score like the trained model; nothing is registered.
    """
    with tempfile.TemporaryDirectory(prefix="convoy-publish-") as name:
        log.info("exporting the network for other engines")
        exports = export_network(preprocessed, choose_calibration(data.train))
        champion = score_champion(store, manifest.model, data.validation, device)
        bundle = write_version(
            Path(name) / "bundle", manifest, preprocessed, data, heldout, report, exports, champion
        )
        pixels = rescore(bundle, data.validation, heldout, device)
        bundle = record_plan_accuracy(bundle, pixels, heldout.labels, device)
        return store.publish(bundle, version_tags(manifest))


def version_tags(manifest: Manifest) -> dict[str, str]:
    """The tags of a version in MLflow, which lists of versions show."""
    return {
        "convoy.recipe": manifest.source.recipe,
        **{f"convoy.{key}": f"{value:.6f}" for key, value in manifest.metrics.items()},
    }


def write_version(  # noqa: PLR0913 - what a bundle is made of
    folder: Path,
    manifest: Manifest,
    preprocessed: PreprocessedModel,
    data: Dataset,
    heldout: Evaluation,
    report: Path,
    exports: Mapping[str, bytes],
    champion: ChampionScores | None = None,
) -> Bundle:
    """Write the bundle of one version to ``folder``; ``exports`` come from ``export_network``.

    ``champion`` holds the champion's scores of the held-out pictures, if there is a champion.
    """
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in preprocessed.network.state_dict().items()
    }
    files = {
        WEIGHTS: safetensors.torch.save(state),
        **example_files(data, heldout, champion),
        THUMBNAILS: to_npz(pixels=shrink(data.validation.pixels)),
        **exports,
    }
    files |= golden_files(data.validation, heldout.probabilities)
    files |= {f"report/{path.name}": path.read_bytes() for path in sorted(report.iterdir())}
    scored = champion.manifest_sha256 if champion else None
    return write_bundle(folder, replace(manifest, scored_champion=scored), files)


def golden_files(examples: Examples, probabilities: NDArray[np.float32]) -> dict[str, bytes]:
    """The golden images of ``examples``, and their probabilities (N, classes) to be published."""
    files, golden = {}, []
    for position in choose_golden(examples):
        file = f"golden/{examples.digests[position][:16]}"
        files[file] = examples.encode(position)
        golden.append(GoldenImage(file, tuple(probabilities[position].tolist())))
    return {**files, GOLDEN: msgspec.json.encode(golden)}


def choose_golden(examples: Examples) -> list[int]:
    """The positions of up to 32 golden images.

    Each class gives one picture in turn, in the order of the digests. A class gives pictures above
    512 kB only after all of its smaller ones.
    """
    by_class: dict[int, list[int]] = {}
    for position in sorted(range(len(examples)), key=lambda each: examples.digests[each]):
        by_class.setdefault(int(examples.labels[position]), []).append(position)

    def small_first(positions: list[int]) -> Iterator[int]:
        large = []
        for position in positions:
            if len(examples.encode(position)) <= GOLDEN_SIZE_BYTES:
                yield position
            else:
                large.append(position)
        yield from large

    turns = zip_longest(*(small_first(positions) for _, positions in sorted(by_class.items())))
    in_turn = (position for turn in turns for position in turn if position is not None)
    return list(islice(in_turn, GOLDEN_IMAGES))


def choose_calibration(examples: Examples) -> Pixels:
    """Up to 256 pictures of ``examples``, or as many as fit into 16 MB, chosen by digest."""
    one = examples.pixels[0].nbytes
    count = max(1, min(CALIBRATION_IMAGES, CALIBRATION_SIZE_BYTES // one, len(examples)))
    order = sorted(range(len(examples)), key=lambda each: examples.digests[each])
    chosen: Pixels = examples.pixels[order[:count]]
    return chosen


def shrink(pixels: Pixels) -> Pixels:
    """Thumbnails of at most 64 px a side, of the first pictures that fit into 32 MB.

    Args:
        pixels: uint8 (N, H, W, C).
    """
    step = -(-max(pixels.shape[1:3]) // THUMBNAIL_PX)
    one = pixels[0, ::step, ::step].nbytes
    small: Pixels = pixels[: THUMBNAILS_SIZE_BYTES // one, ::step, ::step]
    return small


def rescore(bundle: Bundle, examples: Examples, expected: Evaluation, device: str) -> Pixels:
    """Score the *encoded* held-out pictures with the bundle, as a worker would, and compare.

    Returns:
        The decoded pictures, uint8 (N, H, W, C).

    Raises:
        BundleInvalid: a probability differs from ``expected`` by more than 1e-4.
    """
    classifier = eager_classifier(PlanContext(bundle).preprocessed, device)
    replay_golden(bundle, classifier, find_plan(EAGER))
    spec = bundle.manifest.preprocess
    encoded = (examples.encode(position) for position in range(len(examples)))
    pixels = np.stack([decode_image(data, spec, TRUSTED_LIMITS) for data in encoded])
    difference = np.abs(classifier.classify(pixels) - expected.probabilities).max(axis=1)
    worst = int(difference.argmax())
    log.info(
        "re-scored %d encoded pictures from the bundle: largest difference %.2g",
        len(examples),
        difference[worst],
    )
    if not difference[worst] <= RESCORE_TOLERANCE:  # also true of NaN
        raise BundleInvalid(
            "the bundle does not score like the trained model: a probability of held-out picture "
            f"{worst} differs by {difference[worst]:.2g}, and at most {RESCORE_TOLERANCE:g} is "
            "accepted"
        )
    return pixels


def _git_commit() -> str | None:
    """The checkout's commit, with ``-dirty`` if files have changed; None outside of git."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def public_version(package: str) -> str:
    """The version without its local part (``+cpu``), which a package index does not know."""
    return importlib.metadata.version(package).partition("+")[0]
