"""Lets MLflow load a bundle as a ``python_function``, on the same ``Classifier`` that serves.

``mlflow.pyfunc.load_model("models:/fashion@champion").predict(frame)`` gives the service's
probabilities. The bundle's ``MLmodel`` names this module. Convoy's own serving does not use it.
"""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from registry.core.devices import choose_device
from registry.core.errors import ConvoyError, InvalidImage
from registry.core.paths import convoy_paths
from registry.model.bundle import open_bundle
from registry.model.classifier import Classifier
from registry.model.image.decode import decode_image
from registry.model.manifest import Manifest
from registry.model.plans.planner import Planner, reference_plan


class ImageModel:
    """Classifies encoded images: one row of scores for each image."""

    def __init__(self, manifest: Manifest, classifier: Classifier) -> None:
        self._manifest = manifest
        self._classifier = classifier

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Classify encoded images.

        Args:
            model_input: a frame whose column ``image`` (or, without one, its first column) holds
                the bytes of image files, or their base64 as text or bytes; or any sequence of such.
            params: unused; MLflow passes it.

        Returns:
            A frame with ``label``, ``index`` and ``probability`` of the best class, and with the
            ``probabilities`` of all classes in the manifest's order.

        Raises:
            InvalidImage: an image cannot be decoded; the message has its position, from 0.
        """
        if isinstance(model_input, pd.DataFrame):
            model_input = model_input["image" if "image" in model_input else model_input.columns[0]]
        pixels = []
        for position, item in enumerate(model_input):
            try:
                pixels.append(decode_image(_as_bytes(item), self._manifest.preprocess))
            except ConvoyError as error:
                raise InvalidImage(f"image {position}: {error}") from error
        scores = self._classifier.classify(np.stack(pixels)).astype(float)
        best = scores.argmax(axis=1)
        return pd.DataFrame(
            {
                "label": [self._manifest.labels[index] for index in best],
                "index": best,
                "probability": scores.max(axis=1),
                "probabilities": scores.tolist(),
            }
        )


def _load_pyfunc(path: str) -> ImageModel:
    """The model in the bundle folder ``path``. MLflow calls this function by its name."""
    bundle = open_bundle(Path(path))
    plan = reference_plan(bundle.manifest).name
    planner = Planner(convoy_paths().plans, choose_device("auto"), threads=None, wanted=plan)
    return ImageModel(bundle.manifest, planner.load(bundle))


def _as_bytes(item: Any) -> bytes:
    """The image in ``item``: bytes, or base64 as text or as bytes.

    MLflow's scoring server decodes base64 in tables, and passes it on as bytes in its forms
    ``inputs`` and ``instances``. An encoded image never consists of base64's characters only.
    """
    data = item.encode() if isinstance(item, str) else bytes(item)
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        if isinstance(item, str):
            raise InvalidImage(f"the text is not base64 ({error}); send bytes or base64") from error
    return data
