"""Scores a published version on labelled pictures, and keeps that as its held-out record."""

import logging
import tempfile
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from registry.core.errors import UsageError
from registry.core.names import sha256_hex
from registry.model.bundle import THUMBNAILS, to_npz
from registry.model.classifier import load_classifier
from registry.model.image.decode import in_order
from registry.model.manifest import DataRecord, FileEntry, LaterEvaluation
from registry.model.plans.base import PlanContext
from registry.model.plans.planner import reference_plan
from registry.model.refs import ModelVersion
from registry.store.mlflow_store import ModelStore
from training.data.example_folder import read_examples
from training.publishing.evaluate import Evaluation
from training.publishing.publish import shrink
from training.publishing.records import SCORED_AT_ONCE, heldout_files, score_champion

log = logging.getLogger(__name__)


def evaluate_later(store: ModelStore, version: ModelVersion, folder: Path) -> LaterEvaluation:
    """Score ``version`` on the pictures in ``folder``, which lie in folders named after labels.

    The champion of that moment is scored on them, too, so that the gate can compare the two. The
    record replaces an earlier one, and the gate uses it instead of that of the bundle.

    Raises:
        UsageError: the pictures have no labels, or one cannot be decoded.
        BundleInvalid: the version cannot be read, or does not give its published scores.
        RegistryUnavailable: the registry did not take the record.
    """
    with tempfile.TemporaryDirectory(prefix="convoy-evaluate-") as name:
        bundle = store.download(version, Path(name), lambda each: each.serving_files())
        manifest = bundle.manifest
        examples, is_labelled = read_examples(folder, manifest.labels, manifest.preprocess)
        if not is_labelled:
            raise UsageError(
                f"the pictures in {folder} are in no folders that are named after labels "
                f"({', '.join(manifest.labels[:5])} …)"
            )
        classifier = load_classifier(PlanContext(bundle), reference_plan(manifest))
        log.info("scoring version %d on %d pictures", version.version, len(examples))
        parts = range(0, len(examples), SCORED_AT_ONCE)
        scores = [classifier.classify(examples.pixels[at : at + SCORED_AT_ONCE]) for at in parts]
    heldout = Evaluation(examples.labels, np.concatenate(scores))
    champion = score_champion(store, version.name, examples, "cpu")
    in_rgb = replace(examples, pixels=in_order(examples.pixels, manifest.preprocess))
    files = {
        **heldout_files(in_rgb, heldout, champion),
        THUMBNAILS: to_npz(pixels=shrink(in_rgb.pixels)),
    }
    evaluation = LaterEvaluation(
        manifest_sha256=version.manifest_sha256,
        data=DataRecord(
            name=folder.resolve().name, sha256=examples.sha256, counts={"validation": len(examples)}
        ),
        metrics=heldout.metrics("validation"),
        scored_champion=champion.manifest_sha256 if champion else None,
        files={file: FileEntry(sha256_hex(data), len(data)) for file, data in files.items()},
    )
    store.evaluations.attach(version, evaluation, files)
    return evaluation
