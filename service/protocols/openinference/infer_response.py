"""Writes the answer to an inference request: the wanted outputs, as JSON or in binary form."""

from typing import Any

import msgspec
from msgspec import Struct

from registry.core.errors import InvalidTensor
from service.inference.requests import Probabilities, Result, top_classes
from service.protocols.inference_app import Answer
from service.protocols.openinference.tensors import (
    ENCODED,
    LABELS,
    NORMALISED,
    PROBABILITIES,
    bytes_tensor,
)

MAX_TOP_K = 10_000
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
    requested: list[tuple[str, dict[str, Any] | None]], parameters: dict[str, Any]
) -> list[WantedOutput]:
    """The outputs that a request wants; both, if it names none.

    Args:
        requested: the name and the parameters of each output that the request names.
        parameters: those of the request.

    Raises:
        InvalidTensor: an output does not exist, or a parameter has an impossible value.
    """
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
            f"there is no output {name[:40]!r}; there are {PROBABILITIES} and {LABELS}"
        )
    if "shared_memory_region" in parameters:
        raise InvalidTensor("shared memory is not supported; receive the tensor in the answer")
    classification = _number(parameters, "classification", default=0)
    if classification and name == LABELS:
        raise InvalidTensor(f"{LABELS} has no classification; ask for it on {PROBABILITIES}")
    return WantedOutput(name, parameters.get("binary_data", binary) is True, top_k, classification)


def _number(parameters: dict[str, Any], name: str, default: int) -> int:
    value = parameters.get(name, default)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not is_number or not min(1, default) <= value <= MAX_TOP_K:
        raise InvalidTensor(
            f"the parameter {name} is {str(value)[:40]!r}; it must be a whole number from "
            f"{min(1, default)} to {MAX_TOP_K}"
        )
    return int(value)


def write(result: Result, wanted: list[WantedOutput], request_id: str) -> Answer:
    """The answer with the ``wanted`` outputs; ``request_id`` is the client's own, or empty.

    Raises:
        Exception: the error of an image.
    """
    tensors, blobs = [], []
    rows = probability_rows(result)
    for each in wanted:
        tensor, blob = _tensor(each, rows, result.served.manifest.labels)
        tensors.append(tensor)
        blobs.append(blob)
    head = _encode(
        InferAnswer(
            model_name=result.served.name,
            model_version=str(result.served.version),
            id=request_id,
            outputs=tensors,
        )
    )
    if not any(each.binary for each in wanted):
        return Answer(head)
    length = ("Inference-Header-Content-Length", str(len(head)))
    return Answer(b"".join((head, *blobs)), "application/octet-stream", (length,))


def probability_rows(result: Result) -> list[Probabilities]:
    """The probabilities of all images; raises the error of the first image that failed."""
    rows = []
    for each in result.images:
        if isinstance(each, Exception):
            raise each
        rows.append(each)
    return rows


def _tensor(
    wanted: WantedOutput, rows: list[Probabilities], labels: tuple[str, ...]
) -> tuple[OutputTensor, bytes]:
    """One output, and its binary form; that is empty if the client wants JSON."""
    if wanted.name == PROBABILITIES and not wanted.classification:
        shape = len(rows), len(labels)
        if not wanted.binary:
            values = [value for row in rows for value in row.tolist()]
            return OutputTensor(PROBABILITIES, NORMALISED, shape, values), b""
        data = b"".join(row.astype("<f4", copy=False).tobytes() for row in rows)
        return OutputTensor(PROBABILITIES, NORMALISED, shape, parameters=_size(data)), data
    texts = texts_of(wanted, rows, labels)
    shape = len(rows), len(texts) // len(rows)
    if not wanted.binary:
        return OutputTensor(wanted.name, ENCODED, shape, texts), b""
    data = bytes_tensor(text.encode() for text in texts)
    return OutputTensor(wanted.name, ENCODED, shape, parameters=_size(data)), data


def texts_of(wanted: WantedOutput, rows: list[Probabilities], labels: tuple[str, ...]) -> list[str]:
    """The labels, or the texts "probability:index:label", of each image, best first."""
    if wanted.name == LABELS:
        return [each.label for row in rows for each in top_classes(row, labels, wanted.top_k)]
    return [
        f"{each.probability:f}:{each.index}:{each.label}"
        for row in rows
        for each in top_classes(row, labels, wanted.classification)
    ]


def _size(data: bytes) -> dict[str, int]:
    return {"binary_data_size": len(data)}
