"""``Classifier``: from pixels to probabilities. Training measures it, and serving runs it."""

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
from registry.model.manifest import ClassScore
from registry.model.plans.base import Outputs, Plan, PlanContext, PredictFn

log = logging.getLogger(__name__)

# Limits the memory for activations. No larger batch was faster.
LARGEST_BATCH = 256
# At least so many images prove each of a plan's batch sizes.
PROVED_IMAGES = 16
# Without a warm-up, the first request of one image took 22 ms instead of 3 (resnet, 28×28).
WARM_UP_BATCHES = (1, 2, 4, 8)


class Classifier:
    """A loaded plan. Safe to call from several threads: a lock lets one thread run at a time."""

    def __init__(
        self,
        predict: PredictFn,
        plan: str,
        device: str,
        fallback: "Classifier | None" = None,
        is_lost: Callable[[], bool] = lambda: False,
    ) -> None:
        """Wrap the forward pass of a loaded plan.

        Args:
            predict: the forward pass.
            plan: the plan's name.
            device: a description of the device, for people.
            fallback: classifies images that do not fit the device's memory.
            is_lost: returns whether the device has failed; never called during a forward pass.
        """
        self.plan = plan
        self.device = device
        self.lost = False
        """Whether the device has failed for good. Every later call fails, too."""
        self._predict = predict
        self._turn = Lock()
        self._fallback = fallback
        self._is_lost = is_lost

    def classify(self, pixels: Pixels) -> NDArray[np.float32]:
        """Probabilities float32 (N, classes); each row sums to 1. Otherwise like ``predict``."""
        return softmax(self.predict(pixels).logits)

    def predict(self, pixels: Pixels) -> Outputs:
        """Logits and features of images.

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
        """Update ``lost``: the device may have failed while the classifier was idle."""
        with self._turn:
            self.lost = self.lost or self._is_lost()

    def _predict_batch(self, pixels: Pixels) -> Outputs:
        """Run one batch on the device. If it does not fit, run two halves.

        A half that does not fit the device either goes to the fallback.
        """
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
    """Probabilities (N, classes) of logits (N, classes). NaN and infinity give NaN."""
    with np.errstate(invalid="ignore"):
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


def top_classes(
    probabilities: NDArray[np.float32], labels: tuple[str, ...], top_k: int
) -> list[ClassScore]:
    """The ``top_k`` most probable classes, best first; ties are in label order.

    Args:
        probabilities: (classes,).
        labels: of the classes, in their order.
        top_k: at least 1; all classes if there are fewer.
    """
    if top_k == 1:  # the usual case of some protocols; sorting takes longer
        best = int(probabilities.argmax())
        return [ClassScore(labels[best], best, float(probabilities[best]))]
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [
        ClassScore(labels[index], index, value)
        for index, value in zip(order.tolist(), probabilities[order].tolist(), strict=True)
    ]


def load_classifier(
    context: PlanContext, plan: Plan, fallback: Classifier | None = None
) -> Classifier:
    """A warm classifier that runs the bundle with ``plan``, after it replayed the golden images.

    Args:
        context: the bundle, and where to run it.
        plan: how to run it.
        fallback: see ``Classifier``.

    Raises:
        BundleInvalid: the weights do not fit the network, or a golden image does not get its
            published scores.
    """
    classifier = Classifier(
        plan.load(context), plan.name, describe_device(context.device), fallback
    )
    replay_golden(context.bundle, classifier, plan)
    warm_up(classifier, context.bundle.manifest.preprocess.shape)
    return classifier


def warm_up(classifier: Classifier, shape: tuple[int, int, int]) -> None:
    """Run the usual batch sizes once: engines choose kernels at the first use of each shape."""
    for size in WARM_UP_BATCHES:
        classifier.classify(np.zeros((size, *shape), dtype=np.uint8))


def replay_golden(bundle: Bundle, classifier: Classifier, plan: Plan) -> float:
    """Decode and classify the golden images in batches of several sizes; compare the scores.

    The batches are all images at once, and at least sixteen images in batches of each of
    ``plan.batch_sizes``.

    Returns:
        The largest difference to a published probability.

    Raises:
        BundleInvalid: a picture cannot be decoded; a score is not finite; a score differs from the
            published one by more than the manifest's tolerance for the plan's precision; or a
            picture gets another best class although its two best classes were not nearly equal.
    """
    manifest, golden = bundle.manifest, bundle.golden()
    if not golden:
        raise BundleInvalid(
            f"{bundle.folder}: there are no golden images to prove the version with; "
            "publish it again"
        )
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
                    f"{classifier.plan} on {classifier.device}, in a batch of {size}: {error}; "
                    f"its tolerance in {plan.precision} is {tolerance:g}"
                ) from None
            worst = max(worst, difference)
    return worst


def _compare(scores: NDArray[np.float32], expected: NDArray[np.float32], tolerance: float) -> float:
    """The largest difference; ``BundleInvalid`` if ``scores`` differ too much from ``expected``."""
    if scores.shape != expected.shape:
        raise BundleInvalid(
            f"golden images have {expected.shape[1]} probabilities, the network {scores.shape[1]}"
        )
    if not np.isfinite(scores).all():
        raise BundleInvalid("golden images get NaN or infinite scores")
    difference = float(np.abs(scores - expected).max())
    if difference > tolerance:
        raise BundleInvalid(f"a score differs by {difference:.2g} from the published probability")
    ordered = np.sort(expected, axis=1)
    near_ties = ordered[:, -1] - ordered[:, -2] < tolerance
    changed = (scores.argmax(axis=1) != expected.argmax(axis=1)) & ~near_ties
    if changed.any():
        raise BundleInvalid(
            f"{int(changed.sum())} of {len(expected)} golden images get another best class"
        )
    return difference
