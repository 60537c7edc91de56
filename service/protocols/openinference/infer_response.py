"""Writes the answer to an inference request: the wanted outputs, as JSON or in binary form."""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from registry.core.errors import InvalidTensor
from registry.model.classifier import top_classes
from service.inference.requests import Probabilities, Result
from service.protocols.inference_app import HttpAnswer
from service.protocols.openinference.tensors import (
    ENCODED,
    LABELS,
    NORMALISED,
    PROBABILITIES,
    bytes_tensor,
)

MAX_TOP_K = 10_000
MAX_OUTPUTS = 2
_encode = msgspec.json.Encoder().encode


class WantedOutput(Struct, frozen=True):
    """One output of an answer.

    Attributes:
        name: ``PROBABILITIES`` or ``LABELS``.
        binary: whether the tensor follows the JSON in binary form.
        top_k: for ``LABELS``, how many labels each image gets, best first.
        classification: for ``PROBABILITIES``, how many classes each image gets as a text
            "probability:index:label", best first; 0 for a plain tensor of all probabilities.
    """

    name: str
    binary: bool
    top_k: int
    classification: int = 0


class OutputTensor(Struct, frozen=True, omit_defaults=True):
    """One output tensor; without ``data`` if it follows in binary form."""

    name: str
    datatype: str
    shape: tuple[int, int]
    data: list[Any] | None = None
    parameters: dict[str, int] | None = None


class InferAnswer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The JSON of an answer. ``id`` is the request's, if it had one."""

    model_name: str
    model_version: str
    id: str = ""
    outputs: list[OutputTensor]


def wanted_outputs(
    requested: Sequence[tuple[str, dict[str, Any] | None]], parameters: dict[str, Any]
) -> list[WantedOutput]:
    """The outputs that a request wants; both, if it names none.

    Args:
        requested: the name and the parameters of each output that the request names.
        parameters: those of the request.

    Raises:
        InvalidTensor: an output does not exist or is named twice, or a parameter has an impossible
            value.
    """
    if len(requested) > MAX_OUTPUTS or len({name for name, _ in requested}) < len(requested):
        raise InvalidTensor(f"name each output once; the outputs are {PROBABILITIES} and {LABELS}")
    if parameters.get("sequence_id"):
        raise InvalidTensor("sequences are not supported; send each request alone")
    top_k = _number(parameters, "top_k", default=1)
    binary = parameters.get("binary_data_output") is True
    if not requested:
        requested = [(PROBABILITIES, None), (LABELS, None)]
    return [_wanted(name, own or {}, binary, top_k) for name, own in requested]


def _wanted(name: str, parameters: dict[str, Any], binary: bool, top_k: int) -> WantedOutput:
    if name not in (PROBABILITIES, LABELS):
        raise InvalidTensor(
            f"there is no output {name[:40]!r}; the outputs are {PROBABILITIES} and {LABELS}"
        )
    refuse_shared_memory(parameters)
    classification = _number(parameters, "classification", default=0)
    if classification and name == LABELS:
        raise InvalidTensor(f"{LABELS} has no classification; ask for it on {PROBABILITIES}")
    return WantedOutput(name, parameters.get("binary_data", binary) is True, top_k, classification)


def refuse_shared_memory(parameters: dict[str, Any]) -> None:
    """Raise ``InvalidTensor`` if the client wants a tensor in shared memory."""
    if "shared_memory_region" in parameters:
        raise InvalidTensor("shared memory is not supported; send and receive tensors in bodies")


def _number(parameters: dict[str, Any], name: str, default: int) -> int:
    value = parameters.get(name, default)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not is_number or not min(1, default) <= value <= MAX_TOP_K:
        raise InvalidTensor(
            f"the parameter {name} is {str(value)[:40]!r}; it must be a whole number from "
            f"{min(1, default)} to {MAX_TOP_K}"
        )
    return int(value)


class Output(Struct, frozen=True):
    """One output of an answer: ``texts`` if its datatype is BYTES, otherwise ``rows`` of FP32."""

    wanted: WantedOutput
    datatype: str
    shape: tuple[int, int]
    texts: list[str] = []
    rows: list[Probabilities] = []

    def binary(self) -> bytes:
        """The tensor in binary form."""
        if self.datatype == ENCODED:
            return bytes_tensor(text.encode() for text in self.texts)
        return b"".join(row.astype("<f4", copy=False).tobytes() for row in self.rows)

    def plain(self) -> list[Any]:
        """The values in row-major order."""
        return self.texts or [value for row in self.rows for value in row.tolist()]


def outputs_of(result: Result, wanted: list[WantedOutput]) -> list[Output]:
    """The ``wanted`` outputs."""
    rows = result.rows()
    labels = result.served.manifest.labels
    return [_output(each, rows, labels) for each in wanted]


def write(result: Result, wanted: list[WantedOutput], body_id: str) -> HttpAnswer:
    """The answer with the ``wanted`` outputs; ``body_id`` is the ``id`` of the request's body."""
    tensors, blobs = [], []
    for each in outputs_of(result, wanted):
        if each.wanted.binary:
            blobs.append(each.binary())
            size = {"binary_data_size": len(blobs[-1])}
            tensor = OutputTensor(each.wanted.name, each.datatype, each.shape, parameters=size)
        else:
            tensor = OutputTensor(each.wanted.name, each.datatype, each.shape, each.plain())
        tensors.append(tensor)
    head = _encode(
        InferAnswer(
            model_name=result.served.name,
            model_version=str(result.served.version),
            id=body_id,
            outputs=tensors,
        )
    )
    if not blobs:
        return HttpAnswer(head)
    length = ("Inference-Header-Content-Length", str(len(head)))
    return HttpAnswer(b"".join((head, *blobs)), "application/octet-stream", (length,))


def _output(wanted: WantedOutput, rows: list[Probabilities], labels: tuple[str, ...]) -> Output:
    if wanted.name == LABELS:
        texts = [each.label for row in rows for each in top_classes(row, labels, wanted.top_k)]
    elif wanted.classification:
        texts = [
            f"{each.probability:f}:{each.index}:{each.label}"
            for row in rows
            for each in top_classes(row, labels, wanted.classification)
        ]
    else:
        return Output(wanted, NORMALISED, (len(rows), len(labels)), rows=rows)
    return Output(wanted, ENCODED, (len(rows), len(texts) // len(rows)), texts)
