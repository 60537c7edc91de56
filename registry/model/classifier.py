"""Pixels in, probabilities out: the one object that training measures and serving runs."""

import logging
from collections.abc import Callable
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from registry.core.devices import describe_device
from registry.core.errors import BundleInvalid, ConvoyError, DeviceLost, DeviceOutOfMemory
from registry.model.bundle import Bundle
from registry.model.image.decode import Pixels, decode_image
from registry.model.image.limits import TRUSTED_LIMITS
from registry.model.plans.base import Outputs, Plan, PredictFn, Source

log = logging.getLogger(__name__)

# Memory for activations, not speed, decides: above this nothing here gets faster.
LARGEST_BATCH = 256
# Of each batch size beside that of all golden images.
PROVED_IMAGES = 16
# With one image cold, the first request took 22 ms instead of 3 (resnet, 28×28).
WARM_UP_BATCHES = (1, 2, 4, 8)


class Classifier:
    """A plan that is loaded and ready. Safe to call from several threads; they take turns."""

    def __init__(
        self,
        predict: PredictFn,
        plan: str,
        device: str,
        fallback: "Classifier | None" = None,
        is_lost: Callable[[], bool] = lambda: False,
    ) -> None:
        """A forward pass, and what is known of it.

        Args:
            predict: the forward pass.
            plan: the name of the plan that it is.
            device: as people should read it.
            fallback: answers what does not fit the device's memory.
            is_lost: whether the device has failed since; never asked during a forward pass.
        """
        self.plan = plan
        self.device = device
        self.lost = False
        """Whether the device has failed for good, so that nothing will be answered any more."""
        self._predict = predict
        self._turn = Lock()
        self._fallback = fallback
        self._is_lost = is_lost

    def classify(self, pixels: Pixels) -> NDArray[np.float32]:
        """Probabilities float32 (N, classes) whose rows sum to 1; else as ``predict``."""
        return softmax(self.predict(pixels).logits)

    def predict(self, pixels: Pixels) -> Outputs:
        """Logits and features.

        Args:
            pixels: uint8 (N, height, width, channels), N ≥ 1.

        Raises:
            DeviceLost: the device failed for good.
        """
        try:
            with self._turn:
                return Outputs.joined(
                    [
                        self._predict_batch(pixels[start : start + LARGEST_BATCH])
                        for start in range(0, len(pixels), LARGEST_BATCH)
                    ]
                )
        except DeviceLost:
            self.lost = True
            raise

    def check(self) -> None:
        """Find out whether the device was lost while nothing was asked of it."""
        with self._turn:
            self.lost = self.lost or self._is_lost()

    def _predict_batch(self, pixels: Pixels) -> Outputs:
        """On the device; what does not fit it, in two halves; what still does not, by fallback."""
        try:
            return self._predict(pixels)
        except DeviceOutOfMemory as error:
            if self._fallback is None:
                raise
            log.warning("%d images do not fit %s: %s", len(pixels), self.device, error)
            middle = (len(pixels) + 1) // 2
            halves = [half for half in (pixels[:middle], pixels[middle:]) if len(half)]
            return Outputs.joined([self._predict_half(half) for half in halves])

    def _predict_half(self, pixels: Pixels) -> Outputs:
        assert self._fallback is not None
        try:
            return self._predict(pixels)
        except DeviceOutOfMemory:
            return self._fallback.predict(pixels)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities (N, classes) of logits (N, classes); NaN and infinity give NaN."""
    with np.errstate(invalid="ignore"):
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


def load_classifier(source: Source, plan: Plan, fallback: Classifier | None = None) -> Classifier:
    """The classifier that runs ``source``'s bundle by ``plan``, proved on its golden images.

    Args:
        source: the bundle, and where to run it.
        plan: how to run it.
        fallback: see ``Classifier``.

    Raises:
        BundleInvalid: the weights do not fit the network, or a golden image does not score as it
            was published.
    """
    classifier = Classifier(plan.load(source), plan.name, describe_device(source.device), fallback)
    replay_golden(source.bundle, classifier, plan)
    warm_up(classifier, source.bundle.manifest.preprocess.shape)
    return classifier


def warm_up(classifier: Classifier, shape: tuple[int, int, int]) -> None:
    """Run the batch sizes that serving meets: kernels are chosen at each shape's first use."""
    for size in WARM_UP_BATCHES:
        classifier.classify(np.zeros((size, *shape), dtype=np.uint8))


def replay_golden(bundle: Bundle, classifier: Classifier, plan: Plan) -> float:
    """Send the golden images through decoding and ``classifier``, in batches of several sizes.

    All of them at once, and at least sixteen in batches of each of ``plan.batch_sizes``.

    Returns:
        The largest difference in probability to what was published.

    Raises:
        BundleInvalid: a picture cannot be decoded, a score is not finite, one differs from what
            was published by more than the manifest's tolerance for the plan's precision, or a
            picture has another best class, and its two best were not nearly equal.
    """
    manifest, golden = bundle.manifest, bundle.golden()
    if not golden:
        raise BundleInvalid(f"{bundle.folder}: there are no golden images to prove the version on")
    try:
        pixels = np.stack(
            [
                decode_image(bundle.read(each.file), manifest.preprocess, TRUSTED_LIMITS)
                for each in golden
            ]
        )
    except ConvoyError as error:
        raise BundleInvalid(f"{bundle.folder}: a golden image: {error}") from error
    expected = np.array([each.probabilities for each in golden], dtype=np.float32)
    tolerance = manifest.tolerances[plan.precision]
    worst = 0.0
    for size in (len(golden), *plan.batch_sizes):
        for start in range(0, max(size, PROVED_IMAGES), size):
            positions = np.arange(start, start + size) % len(golden)
            scores = classifier.classify(pixels[positions])
            try:
                difference = _compare(scores, expected[positions], tolerance)
            except BundleInvalid as error:
                raise BundleInvalid(
                    f"on {classifier.device} by {classifier.plan}, in a batch of {size}: {error}; "
                    f"its tolerance in {plan.precision} is {tolerance:g}"
                ) from None
            worst = max(worst, difference)
    return worst


def _compare(scores: NDArray[np.float32], expected: NDArray[np.float32], tolerance: float) -> float:
    """The largest difference; ``BundleInvalid`` if ``scores`` are not ``expected``."""
    if scores.shape != expected.shape:
        raise BundleInvalid(
            f"golden images have {expected.shape[1]} probabilities, the network {scores.shape[1]}"
        )
    if not np.isfinite(scores).all():
        raise BundleInvalid("it scores NaN or infinity on its golden images")
    difference = float(np.abs(scores - expected).max())
    if difference > tolerance:
        raise BundleInvalid(f"it differs by {difference:.2g} from its published probabilities")
    ordered = np.sort(expected, axis=1)
    near_ties = ordered[:, -1] - ordered[:, -2] < tolerance
    changed = (scores.argmax(axis=1) != expected.argmax(axis=1)) & ~near_ties
    if changed.any():
        raise BundleInvalid(
            f"another best class for {int(changed.sum())} of {len(expected)} golden images"
        )
    return difference
