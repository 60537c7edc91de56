"""The job of ``convoy import``: from a foreign graph to a version that is proved and registered."""

import logging
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from registry.core.errors import ReferenceDiffers, UsageError
from registry.core.names import sha256_hex
from registry.core.paths import Paths
from registry.model.bundle import (
    ONNX_GRAPH,
    THUMBNAILS,
    Bundle,
    to_npz,
    write_bundle,
)
from registry.model.classifier import Classifier, load_classifier
from registry.model.image.decode import Pixels, in_order
from registry.model.manifest import (
    SCHEMA_VERSION,
    DataRecord,
    ImportRecord,
    Manifest,
    OnnxNetwork,
    PreprocessSpec,
    SourceRecord,
)
from registry.model.plans.base import PlanContext
from registry.model.plans.planner import reference_plan
from registry.model.refs import ModelVersion
from registry.store.mlflow_store import ModelStore
from training.data.example_folder import decode_examples, read_examples
from training.data.sources import Examples
from training.importing.diagnosis import diagnose
from training.importing.graph import GraphFacts, Scores, adapt, describe, read_graph
from training.importing.owner import OwnerGraph, Probabilities
from training.importing.preprocess_file import make_spec
from training.importing.quantise import quantise
from training.importing.reference import (
    Agreement,
    Evidence,
    Reference,
    compare,
    read_reference,
)
from training.publishing.evaluate import Evaluation
from training.publishing.plan_accuracy import record_plan_accuracy
from training.publishing.publish import (
    choose_calibration,
    golden_files,
    public_version,
    shrink,
    version_tags,
)
from training.publishing.records import heldout_files, score_champion
from training.publishing.tracking import start_run

log = logging.getLogger(__name__)

EXPERIMENT = "convoy"
# The largest difference of a probability from the owner's.
TOLERANCE = 1e-3
# So many pictures of a reference serve as examples if there are no others.
MAX_REFERENCE_EXAMPLES = 1000
DIAGNOSED = 8  # pictures of the reference on which changes are tried
RECORDED_PACKAGES = ("numpy", "pillow", "msgspec", "onnx", "onnxruntime")


class ForeignModel(Struct, frozen=True, kw_only=True):
    """A model that was trained elsewhere, as an import gets it.

    Attributes:
        name: its name in the registry.
        graph: the bytes of its ONNX graph.
        origin: where it comes from, for people.
        labels: of its classes, in their order.
        preprocess: the members of a preprocessing file.
        output: the output with the scores, if the graph has several.
        scores: what they are; None to find it out.
    """

    name: str
    graph: bytes
    origin: str
    labels: tuple[str, ...]
    preprocess: dict[str, Any]
    output: str | None = None
    scores: Scores | None = None


class Imported(Struct, frozen=True, kw_only=True):
    """What an import made.

    ``reference`` is None without the owner's answers, ``accuracy`` without labelled examples.
    """

    version: ModelVersion
    preprocess: PreprocessSpec
    reference: Agreement | None
    accuracy: float | None
    plan_accuracy: dict[str, float]


def import_model(model: ForeignModel, evidence: Evidence, paths: Paths) -> Imported:
    """Prove ``model``, and register it as the next version, alias ``challenger``.

    Raises:
        UsageError: an argument does not fit the model; the text names the option that would.
        BundleInvalid: the graph breaks a rule of bundles, or its plans do not answer as it does.
        ReferenceDiffers: Convoy does not answer as the owner's reference says; the text says why.
    """
    graph = read_graph(model.graph)
    facts = describe(graph, model.output)
    _check_labels(model.labels, facts)
    spec = make_spec(model.preprocess, facts.height_px, facts.width_px, facts.channels)
    scores = model.scores or facts.scores
    owner = OwnerGraph(model.graph, facts, scores)
    store = ModelStore(paths)
    store.names.check(model.name)
    reference = agreement = None
    if evidence.reference is not None:
        reference = read_reference(evidence.reference, model.labels)
        agreement, answers = _prove_reference(owner, spec, reference)
        if not {"shrink_on_load", "crop_early"} & set(model.preprocess):
            spec = _faster(owner, spec, reference, answers)
    examples, is_labelled = _examples(evidence, reference, model.labels, spec)
    expected = owner.probabilities(examples.pixels, spec)
    labels = examples.labels if is_labelled else expected.argmax(axis=1)
    heldout = Evaluation(labels, expected)
    adapted = adapt(graph, facts, spec, scores)
    files = {ONNX_GRAPH: adapted, **quantise(adapted, choose_calibration(examples))}
    manifest = _manifest(model, spec, examples, heldout, agreement, is_labelled=is_labelled)
    with (
        tempfile.TemporaryDirectory(prefix="convoy-import-") as name,
        start_run(store, EXPERIMENT, f"{model.name} import") as run,
    ):
        run.set_tag("origin", model.origin)
        if is_labelled:
            champion = score_champion(store, model.name, examples, "cpu")
            files |= heldout_files(_in_rgb(examples, spec), heldout, champion)
            manifest = replace(
                manifest, scored_champion=champion.manifest_sha256 if champion else None
            )
        bundle = _write(Path(name) / "bundle", manifest, examples, expected, files)
        classifier = load_classifier(PlanContext(bundle), reference_plan(manifest))
        if reference is not None:
            agreement = _prove_bundle(classifier, spec, reference)
        bundle = record_plan_accuracy(bundle, examples.pixels, labels, "cpu")
        run.log_metrics(manifest.metrics)
        version = store.publish(bundle, version_tags(manifest))
    return Imported(
        version=version,
        preprocess=spec,
        reference=agreement,
        accuracy=heldout.accuracy if is_labelled else None,
        plan_accuracy=bundle.manifest.plan_accuracy,
    )


def _check_labels(labels: tuple[str, ...], facts: GraphFacts) -> None:
    wanted = max(2, facts.outputs)  # one score is that of the second of two classes
    if len(labels) != wanted:
        raise UsageError(
            f"the output {facts.output!r} has {facts.outputs:,} scores, and there are "
            f"{len(labels):,} labels; --labels needs {wanted:,} lines"
        )
    if len(set(labels)) != len(labels):
        twice = next(each for each in labels if labels.count(each) > 1)
        raise UsageError(f"the label {twice!r} is there twice; labels must differ from each other")


def _examples(
    evidence: Evidence, reference: Reference | None, labels: tuple[str, ...], spec: PreprocessSpec
) -> tuple[Examples, bool]:
    """The pictures for golden images and calibration, and whether their labels are known."""
    if evidence.examples is not None:
        return read_examples(evidence.examples, labels, spec)
    assert reference is not None  # ``Evidence`` has one of the two
    # The owner's answers are not true labels: the model may have been wrong at home, too.
    paths = reference.paths[:MAX_REFERENCE_EXAMPLES]
    return decode_examples(list(paths), [0] * len(paths), spec), False


def _prove_reference(
    owner: OwnerGraph, spec: PreprocessSpec, reference: Reference
) -> tuple[Agreement, Probabilities]:
    """The agreement of the original graph, fed by Convoy's decoder, with the owner's answers.

    Returns:
        The agreement, and the graph's answers.

    Raises:
        ReferenceDiffers: they differ; the text says which step of the preprocessing is the cause.
    """
    answers = owner.probabilities(reference.decoded(spec), spec)
    agreement = compare(answers, reference, TOLERANCE)
    if agreement.holds:
        return agreement, answers
    log.info("%s; looking for the cause", _difference(agreement, reference))
    some = reference.take(_most_different(answers, reference))
    cause = diagnose(_Scored(owner, some).score, spec, some, TOLERANCE)
    text = f"{_difference(agreement, reference)}. {cause}"
    if cause.changes:
        changed = cause.changes[-1].spec
        then = compare(
            owner.probabilities(reference.decoded(changed), changed), reference, TOLERANCE
        )
        text += f". With that, {then.equal} of all {then.total} answers are equal"
    raise ReferenceDiffers(text)


def _faster(
    owner: OwnerGraph, spec: PreprocessSpec, reference: Reference, answers: Probabilities
) -> PreprocessSpec:
    """``spec`` with those shortcuts of decoding with which the owner's answers hold, too.

    Without probabilities from the owner, the best classes alone would not show what they move.

    Args:
        owner: the original graph.
        spec: the preprocessing without shortcuts.
        reference: the owner's answers.
        answers: those of the graph by ``spec``.
    """
    if np.isnan(reference.probabilities).all():
        return spec
    for shortcut in ("crop_early", "shrink_on_load"):
        faster = replace(spec, **{shortcut: True})
        moved = owner.probabilities(reference.decoded(faster), faster)
        # Answers that are exactly the same show that no picture was large enough to prove it.
        if compare(moved, reference, TOLERANCE).holds and not np.array_equal(moved, answers):
            spec, answers = faster, moved
    return spec


class _Scored:
    """Scores the same pictures by one preprocessing after another; decodes as seldom as it can."""

    def __init__(self, owner: OwnerGraph, reference: Reference) -> None:
        self._owner = owner
        self._reference = reference
        self._decoded: dict[PreprocessSpec, list[Pixels]] = {}

    def score(self, spec: PreprocessSpec) -> Probabilities:
        """float32 (N, classes) by ``spec``."""
        # The normalisation happens after decoding.
        plain = replace(spec, mean=(0.0,) * spec.channels, std=(1.0,) * spec.channels)
        if plain not in self._decoded:
            self._decoded[plain] = list(self._reference.decoded(plain))
        return self._owner.probabilities(self._decoded[plain], spec)


def _prove_bundle(classifier: Classifier, spec: PreprocessSpec, reference: Reference) -> Agreement:
    """The agreement of the bundle, run as a worker runs it, with the owner's answers."""
    answers = [classifier.classify(pixels[None]) for pixels in reference.decoded(spec)]
    agreement = compare(np.concatenate(answers), reference, TOLERANCE)
    if not agreement.holds:
        raise ReferenceDiffers(f"by {classifier.plan}, {_difference(agreement, reference)}")
    return agreement


def _difference(agreement: Agreement, reference: Reference) -> str:
    first = reference.paths[agreement.first or 0]
    largest = ""
    if agreement.largest_difference is not None:
        largest = f"; largest difference of a probability: {agreement.largest_difference:.3g}"
    return (
        f"{agreement.total - agreement.equal} of {agreement.total} answers differ from the "
        f"reference (other best class: {agreement.total - agreement.same_best}{largest}), "
        f"first {first.name}"
    )


def _most_different(answers: Probabilities, reference: Reference) -> list[int]:
    """Half of the pictures that are tried differ most; the others are the first ones."""
    lacks = 1 - answers[np.arange(len(answers)), reference.best]
    given = np.nanmax(
        np.abs(answers - reference.probabilities), axis=1, initial=0.0,
        where=~np.isnan(reference.probabilities),
    )  # fmt: skip
    worst = np.argsort(-np.maximum(given, lacks * (answers.argmax(axis=1) != reference.best)))
    chosen = dict.fromkeys([*worst[: DIAGNOSED // 2].tolist(), *range(len(answers))])
    return list(chosen)[:DIAGNOSED]


def _manifest(
    model: ForeignModel,
    spec: PreprocessSpec,
    examples: Examples,
    heldout: Evaluation,
    agreement: Agreement | None,
    *,
    is_labelled: bool,
) -> Manifest:
    metrics = heldout.metrics("validation") if is_labelled else {}
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=model.name,
        network=OnnxNetwork(),
        labels=model.labels,
        preprocess=spec,
        metrics=metrics,
        data=DataRecord(
            name="examples of the import",
            sha256=examples.sha256,
            counts={"validation" if is_labelled else "unlabelled": len(examples)},
        ),
        source=SourceRecord(
            recipe="import",
            seed=0,
            device="cpu",
            versions={
                "python": platform.python_version(),
                **{name: public_version(name) for name in RECORDED_PACKAGES},
            },
        ),
        imported=ImportRecord(
            origin=model.origin,
            sha256=sha256_hex(model.graph),
            compared=agreement.total if agreement else 0,
            largest_difference=agreement.largest_difference if agreement else None,
        ),
    )


def _in_rgb(examples: Examples, spec: PreprocessSpec) -> Examples:
    """``examples`` for people, and for hashes that versions of other preprocessing have, too."""
    return replace(examples, pixels=in_order(examples.pixels, spec))


def _write(
    folder: Path,
    manifest: Manifest,
    examples: Examples,
    expected: Probabilities,
    files: dict[str, bytes],
) -> Bundle:
    """The bundle, whose golden images have the original graph's probabilities."""
    thumbnails = shrink(_in_rgb(examples, manifest.preprocess).pixels)
    return write_bundle(
        folder,
        manifest,
        {**files, **golden_files(examples, expected), THUMBNAILS: to_npz(pixels=thumbnails)},
    )
