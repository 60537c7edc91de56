"""``LocalSource``: a version of the registry answers the pictures in this process."""

import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convoy.classify.inputs import ReadPicture
from convoy.classify.rows import Answer
from registry.core.devices import choose_device, forward_threads
from registry.core.errors import BundleInvalid, ConvoyError, PlanUndecided
from registry.core.paths import Paths, convoy_paths
from registry.delivery.deployment import version_folder
from registry.delivery.signing import TrustedKeys, check_expiry
from registry.model.bundle import Bundle, open_bundle
from registry.model.classifier import Classifier, top_classes
from registry.model.image.decode import Pixels, decode_image
from registry.model.image.limits import DecodeLimits
from registry.model.manifest import Manifest
from registry.model.plans.planner import AUTO, Planner
from registry.model.refs import ModelVersion, parse_model_ref
from registry.store.mlflow_store import ModelStore

log = logging.getLogger(__name__)

BATCH = 32
# Two batches are in memory at a time.
BATCH_BYTES = 64 * 1024 * 1024
DECODE_THREADS = 2

Decoded = list[Pixels | str]


class LocalSource:
    """Decodes the next batch while the network classifies the current one."""

    def __init__(
        self,
        version: int,
        alias: str | None,
        manifest: Manifest,
        classifier: Classifier,
        top_k: int,
    ) -> None:
        self._version = version
        self._alias = alias
        self._manifest = manifest
        self._classifier = classifier
        self._top_k = top_k
        self._limits = DecodeLimits.from_environment()

    def check(self) -> str:
        """The model that this process has loaded."""
        return self._manifest.model

    def class_count(self, model: str, version: int) -> int | None:
        """How many classes the version has that this process has loaded; None for others."""
        is_loaded = (model, version) == (self._manifest.model, self._version)
        return len(self._manifest.labels) if is_loaded else None

    def answers(
        self, pictures: Iterable[ReadPicture]
    ) -> Iterator[tuple[ReadPicture, Answer | str]]:
        """Each picture with its answer, or with the text of an error."""
        present = None
        with ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode") as pool:
            for batch in batches(pictures):
                following = batch, pool.map(self._decode, batch)
                if present is not None:
                    yield from self._classify(present[0], list(present[1]))
                present = following
            if present is not None:
                yield from self._classify(present[0], list(present[1]))

    def _decode(self, picture: ReadPicture) -> Pixels | str:
        if picture.problem:
            return picture.problem
        try:
            return decode_image(picture.content, self._manifest.preprocess, self._limits)
        except ConvoyError as error:
            return str(error)

    def _classify(
        self, batch: list[ReadPicture], decoded: Decoded
    ) -> Iterator[tuple[ReadPicture, Answer | str]]:
        started = time.perf_counter()
        good = [each for each in decoded if not isinstance(each, str)]
        scores = iter(self._classifier.classify(np.stack(good)) if good else ())
        image_ms = round((time.perf_counter() - started) * 1000 / max(1, len(good)), 3)
        for picture, each in zip(batch, decoded, strict=True):
            yield picture, each if isinstance(each, str) else self._answer(next(scores), image_ms)

    def _answer(self, probabilities: NDArray[np.float32], image_ms: float) -> Answer:
        labels = self._manifest.labels
        return Answer(
            model=self._manifest.model,
            version=self._version,
            alias=self._alias,
            plan=self._classifier.plan,
            predictions=tuple(top_classes(probabilities, labels, self._top_k)),
            request_id="",
            timings_ms={"total": image_ms},
        )


def batches(pictures: Iterable[ReadPicture]) -> Iterator[list[ReadPicture]]:
    """Lists of ``BATCH`` pictures. A list ends early when its files have ``BATCH_BYTES``."""
    batch: list[ReadPicture] = []
    size_bytes = 0
    for picture in pictures:
        batch.append(picture)
        size_bytes += len(picture.content)
        if len(batch) == BATCH or size_bytes >= BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


@contextmanager
def open_local(text: str, top_k: int) -> Iterator[LocalSource]:
    """Load the version that ``models:/NAME@ALIAS`` or ``models:/NAME/NUMBER`` means now.

    Raises:
        UsageError: the reference has another form.
        VersionNotFound: the registry has no such version.
        BundleInvalid: the version is damaged, not signed, or no plan gives its published answers.
    """
    ref, paths = parse_model_ref(text), convoy_paths()
    store = ModelStore(paths)
    version = store.resolve(ref)
    _check_signature(version)
    with tempfile.TemporaryDirectory(prefix="convoy-classify-") as folder:
        bundle = _verified_bundle(store, version, paths, Path(folder) / "bundle")
        classifier = _load(bundle, paths)
        yield LocalSource(version.version, ref.alias, bundle.manifest, classifier, top_k)


def _check_signature(version: ModelVersion) -> None:
    """Refuse a version that no trusted key has signed, as the puller does."""
    if trust := TrustedKeys.from_environment():
        names = version.signature, version.name, version.version, version.manifest_sha256
        check_expiry(trust.check(*names), time.time())


def _verified_bundle(
    store: ModelStore, version: ModelVersion, paths: Paths, folder: Path
) -> Bundle:
    """The puller's copy of the bundle on this machine, or else a download into ``folder``."""
    try:
        pulled = version_folder(paths.models, version.name, version.version)
        bundle = open_bundle(pulled, version.manifest_sha256)
        bundle.verify(bundle.serving_files())
    except BundleInvalid:
        bundle = store.download(version, folder, lambda found: found.serving_files())
    if bundle.manifest.model != version.name:
        raise BundleInvalid(
            f"{version.name} version {version.version} has the bundle of the model "
            f"{bundle.manifest.model!r}; publish it again under its own name"
        )
    return bundle


def _load(bundle: Bundle, paths: Paths) -> Classifier:
    """The classifier, with the fastest plan that was proved here with all cores for one pass."""
    device = choose_device(os.environ.get("CONVOY_DEVICE") or "auto")
    wanted = os.environ.get("CONVOY_PLAN") or AUTO
    planner = Planner(paths.plans, device, forward_threads(workers=1), wanted)
    try:
        return planner.load(bundle)
    except PlanUndecided:
        log.info("choosing the fastest plan on this machine, once; this may take a minute")
        planner.choose(bundle)
        return planner.load(bundle)
