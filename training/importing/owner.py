"""``OwnerGraph``: the foreign graph as its owner runs it, apart from everything of Convoy's."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from registry.core.errors import BundleInvalid
from registry.model.classifier import softmax
from registry.model.image.decode import Pixels
from registry.model.manifest import PreprocessSpec
from training.importing.graph import GraphFacts, Scores

Probabilities = NDArray[np.float32]


class OwnerGraph:
    """The original graph in ONNX Runtime, which gets normalised arrays.

    The import compares Convoy's graph and its plans with it, so it shares none of their steps
    behind the pixels.
    """

    def __init__(self, graph: bytes, facts: GraphFacts, scores: Scores) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.load_model_format", "ONNX")
        try:
            self._session = onnxruntime.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the engine raises errors of many types
            raise BundleInvalid(f"ONNX Runtime cannot load the graph: {_brief(error)}") from error
        self._facts = facts
        self._scores = scores

    def probabilities(self, pixels: Iterable[Pixels], spec: PreprocessSpec) -> Probabilities:
        """float32 (N, classes) of uint8 pixels (H, W, C), one picture after the other."""
        return np.concatenate([self._one(each[None], spec) for each in pixels])

    def _one(self, pixels: Pixels, spec: PreprocessSpec) -> Probabilities:
        facts = self._facts
        values = pixels
        if facts.dtype != "uint8":
            mean, std = np.array(spec.mean), np.array(spec.std)
            values = ((pixels / 255 - mean) / std).astype(facts.dtype)
        if facts.layout == "NCHW":
            values = np.ascontiguousarray(values.transpose(0, 3, 1, 2))
        try:
            (found,) = self._session.run([facts.output], {facts.input: values})
        except Exception as error:
            raise BundleInvalid(f"ONNX Runtime cannot run the graph: {_brief(error)}") from error
        scores = np.asarray(found, np.float32).reshape(1, -1)
        if scores.shape[1] > 1:
            return scores if self._scores == "probabilities" else softmax(scores)
        second = scores if self._scores == "probabilities" else 1 / (1 + np.exp(-scores))
        return np.concatenate((1 - second, second), axis=1)


def _brief(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
