"""Pixels in, probabilities out: the one object that training measures and serving runs."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from registry.bundle import Bundle
from registry.contract import Manifest
from registry.devices import describe_device
from registry.errors import BundleInvalid, ConvoyError
from registry.networks import Program, build_program
from registry.preprocess import TRUSTED_LIMITS, Pixels, decode_image

# Memory for activations, not speed, decides: above this nothing here gets faster.
LARGEST_BATCH = 256
# With one image cold, the first request took 22 ms instead of 3 (resnet, 28×28).
WARM_UP_BATCHES = (1, 2, 4, 8)


class Classifier:
    """A program with its weights on a device. Immutable; safe to call from several threads."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self._program = program.to(device).eval()
        self._device = device

    @property
    def device(self) -> str:
        """For people: ``cpu`` or ``cuda:0 (NVIDIA H200)``."""
        return describe_device(self._device)

    @torch.inference_mode()
    def classify(self, pixels: Pixels) -> NDArray[np.float32]:
        """Probabilities of every class.

        Args:
            pixels: uint8 (N, height, width, channels), N ≥ 1.

        Returns:
            float32 (N, classes), rows sum to 1.
        """
        parts = [
            self._program(torch.from_numpy(pixels[start : start + LARGEST_BATCH]).to(self._device))
            for start in range(0, len(pixels), LARGEST_BATCH)
        ]
        probabilities: NDArray[np.float32] = torch.cat(parts).softmax(dim=1).cpu().numpy()
        return probabilities


def load_classifier(bundle: Bundle, device: torch.device) -> Classifier:
    """The classifier of ``bundle``, warmed up and proved on its golden images.

    Raises:
        BundleInvalid: the weights do not fit the network, a score is not finite, or a golden image
            scores outside the manifest's tolerance on this device.
    """
    manifest = bundle.manifest
    classifier = Classifier(build_loaded_program(manifest, bundle.weights()), device)
    replay_golden(bundle, classifier)
    warm_up(classifier, manifest.preprocess.shape)
    return classifier


def warm_up(classifier: Classifier, shape: tuple[int, int, int]) -> None:
    """Run the batch sizes that serving meets: kernels are chosen at each shape's first use."""
    for size in WARM_UP_BATCHES:
        classifier.classify(np.zeros((size, *shape), dtype=np.uint8))


def build_loaded_program(manifest: Manifest, weights: dict[str, NDArray[Any]]) -> Program:
    """The manifest's program with ``weights`` in it; ``BundleInvalid`` when they do not fit."""
    try:
        program = build_program(manifest.network, manifest.preprocess, len(manifest.labels))
        tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
        program.network.load_state_dict(tensors, strict=True)
    except (ConvoyError, RuntimeError) as error:
        raise BundleInvalid(
            f"the weights of {manifest.model} do not fit its network: {error}"
        ) from error
    return program


def replay_golden(bundle: Bundle, classifier: Classifier) -> None:
    """Send the golden images through decoding and ``classifier``.

    Raises:
        BundleInvalid: a picture cannot be decoded, a score is not finite, or one differs from what
            was published by more than the manifest's tolerance.
    """
    manifest, golden = bundle.manifest, bundle.golden()
    if not golden:
        raise BundleInvalid(f"{bundle.folder}: there are no golden images to prove the version on")
    try:
        pixels = [
            decode_image(bundle.read(each.file), manifest.preprocess, TRUSTED_LIMITS)
            for each in golden
        ]
    except ConvoyError as error:
        raise BundleInvalid(f"{bundle.folder}: a golden image: {error}") from error
    expected = np.array([each.probabilities for each in golden], dtype=np.float32)
    scores = classifier.classify(np.stack(pixels))
    if scores.shape != expected.shape:
        raise BundleInvalid(
            f"the golden images have {expected.shape[1]} probabilities, "
            f"the network {scores.shape[1]}"
        )
    if not np.isfinite(scores).all():
        raise BundleInvalid(f"{manifest.model} scores NaN or infinity on its golden images")
    difference = float(np.abs(scores - expected).max())
    if difference > manifest.tolerance:
        raise BundleInvalid(
            f"{manifest.model} differs by {difference:.2g} from its published probabilities on "
            f"{classifier.device}; its tolerance is {manifest.tolerance:g}"
        )
