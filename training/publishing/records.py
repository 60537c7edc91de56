"""Records the examples in a bundle, so that the gate can compare versions of different data."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from PIL import Image

from registry.core.devices import describe_device
from registry.core.errors import ConvoyError, VersionNotFound
from registry.model.bundle import CHAMPION_SCORES, HELDOUT, MAX_ARRAYS_BYTES, TRAINING, to_npz
from registry.model.classifier import Classifier
from registry.model.image.decode import Pixels, decode_image
from registry.model.image.limits import TRUSTED_LIMITS
from registry.model.manifest import PreprocessSpec
from registry.model.plans.base import PlanContext
from registry.model.plans.planner import reference_plan
from registry.model.refs import CHAMPION, ModelRef
from registry.store.mlflow_store import ModelStore
from training.data.sources import Dataset, Examples
from training.publishing.evaluate import Evaluation

log = logging.getLogger(__name__)

SCORED_AT_ONCE = 256
# Label, digest and perceptual hash of an example. Its probabilities take 4 bytes each in addition.
RECORD_BYTES = 8 + 32 + 8
# More than the headers of the arrays need: 128 bytes each.
HEADERS_BYTES = 4096


class ChampionScores(Struct, frozen=True):
    """The champion's scores of the held-out examples of a version that is about to be published.

    Attributes:
        manifest_sha256: the digest of the champion's manifest.
        probabilities: float32 (N, classes of the champion).
    """

    manifest_sha256: str
    probabilities: NDArray[np.float32]


def example_files(
    data: Dataset, heldout: Evaluation, champion: ChampionScores | None
) -> dict[str, bytes]:
    """The bundle's files that identify its training examples, and score its held-out examples."""
    return {
        **heldout_files(data.validation, heldout, champion),
        TRAINING: training_file(data.train),
    }


def training_file(examples: Examples) -> bytes:
    """The file that identifies the training examples."""
    return to_npz(
        digests=np.array([int(digest[:16], 16) for digest in examples.digests], np.uint64),
        perceptual_hashes=difference_hashes(examples.pixels),
    )


def heldout_files(
    examples: Examples, heldout: Evaluation, champion: ChampionScores | None
) -> dict[str, bytes]:
    """The files that score the held-out examples.

    If there are more held-out examples than the gate may unpack, only the first ones are kept.
    """
    classes = heldout.probabilities.shape[1]
    if champion is not None:
        classes = max(classes, champion.probabilities.shape[1])
    kept = slice((MAX_ARRAYS_BYTES - HEADERS_BYTES) // (RECORD_BYTES + 4 * classes))
    digests = np.frombuffer(bytes.fromhex("".join(examples.digests)), np.uint8).reshape(-1, 32)
    files = {
        HELDOUT: to_npz(
            labels=heldout.labels[kept],
            probabilities=heldout.probabilities[kept],
            digests=digests[kept],
            perceptual_hashes=difference_hashes(examples.pixels[kept]),
        ),
    }
    if champion is not None:
        files[CHAMPION_SCORES] = to_npz(probabilities=champion.probabilities[kept])
    return files


def difference_hashes(pixels: Pixels) -> NDArray[np.uint64]:
    """The perceptual hash of each picture, uint64 (N,).

    The picture is divided into 8 rows of 9 cells; each bit says whether brightness rises from one
    cell to the next. A lossy copy, or a copy of another size, differs in only a few bits.

    Args:
        pixels: uint8 (N, H, W, C).
    """
    hashes = np.zeros(len(pixels), np.uint64)
    for index, picture in enumerate(pixels):
        image = Image.fromarray(picture if picture.shape[2] == 3 else picture[..., 0]).convert("L")
        cells = np.asarray(image.resize((9, 8), Image.Resampling.BOX))
        hashes[index] = np.packbits(cells[:, 1:] > cells[:, :-1]).view(np.uint64)[0]
    return hashes


def score_champion(
    store: ModelStore, model: str, examples: Examples, device: str
) -> ChampionScores | None:
    """The champion's scores of ``examples``, which are decoded from files as a worker does it.

    None if there is no champion, or it cannot be downloaded or run. The gate then has no comparison
    on these examples, but the training is not lost.
    """
    try:
        champion = store.resolve(ModelRef(model, alias=CHAMPION))
        with tempfile.TemporaryDirectory(prefix="convoy-champion-") as folder:
            bundle = store.download(champion, Path(folder), lambda each: each.serving_files())
            context = PlanContext(bundle, device)
            plan = reference_plan(bundle.manifest)
            classifier = Classifier(plan.load(context), plan.name, describe_device(device))
        log.info(
            "scoring the champion, version %d, on the %d held-out pictures of this one",
            champion.version,
            len(examples),
        )
        batches = _decoded(examples, bundle.manifest.preprocess)
        scores = np.concatenate([classifier.classify(pixels) for pixels in batches])
    except VersionNotFound:
        return None
    except (ConvoyError, OSError, RuntimeError) as error:  # torch raises RuntimeError
        log.warning("the champion cannot be scored on the new held-out pictures: %s", error)
        return None
    return ChampionScores(champion.manifest_sha256, scores)


def _decoded(examples: Examples, spec: PreprocessSpec) -> Iterator[Pixels]:
    """``examples``, decoded for a version with the preprocessing ``spec``, 256 at a time."""
    for start in range(0, len(examples), SCORED_AT_ONCE):
        positions = range(start, min(start + SCORED_AT_ONCE, len(examples)))
        yield np.stack([decode_image(examples.encode(i), spec, TRUSTED_LIMITS) for i in positions])
