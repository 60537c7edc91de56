"""The records that the client returns, read strictly from a service's JSON.

A field that is missing or has another type is an error. Fields that are not known here are skipped,
so that a newer service can add some.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from convoy_client.errors import ConvoyError, InvalidAnswer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class of a picture, with its ``index`` in the model's labels."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, slots=True)
class Classification:
    """The answer for one picture.

    Attributes:
        model: the name of the model that answered.
        version: the number of its version.
        alias: the alias of that version in the service; None if it has none.
        predictions: the most probable classes, best first.
        request_id: the id of the request in the service's log.
        timings_ms: milliseconds of each stage, under the service's names.
    """

    model: str
    version: int
    alias: str | None
    predictions: tuple[Prediction, ...]
    request_id: str
    timings_ms: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Failure:
    """A picture of ``classify_many`` that got no classification, with the reason."""

    error: ConvoyError


Result = Classification | Failure


@dataclass(frozen=True, slots=True)
class Model:
    """One model of the service. ``version`` and the fields after it are None while none serves."""

    name: str
    wanted: str
    ready: bool
    version: int | None
    alias: str | None
    device: str | None
    plan: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Canary:
    """A version that answers the part ``share`` of the requests, and scores the part ``shadow``."""

    version: int
    share: float
    shadow: float


@dataclass(frozen=True, slots=True)
class ModelDetails(Model):
    """One version that serves, with its labels in the order of ``Prediction.index``."""

    canary: Canary | None
    labels: tuple[str, ...]
    metrics: Mapping[str, float]
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class Metadata:
    """What every token may read about a version; the labels as in ``ModelDetails``."""

    name: str
    alias: str | None
    device: str
    plan: str
    labels: tuple[str, ...]


def read_classification(body: bytes) -> Classification:
    """The classification in an answer of ``/v1/classify``; raises ``InvalidAnswer``."""
    answer = _object(_decoded(body), "the answer")
    model = _object(_field(answer, "model"), "model")
    return Classification(
        model=_text(model, "name"),
        version=_whole(model, "version"),
        alias=_optional(model, "alias", str),
        predictions=tuple(map(_prediction, _list(answer, "predictions"))),
        request_id=_text(answer, "request_id"),
        timings_ms=_numbers(answer, "timings_ms"),
    )


def read_models(body: bytes) -> tuple[Model, ...]:
    """The models in an answer of ``/v1/models``; raises ``InvalidAnswer``."""
    answer = _object(_decoded(body), "the answer")
    found = [_object(each, "models") for each in _list(answer, "models")]
    return tuple(Model(**_summary(each)) for each in found)


def read_model(body: bytes) -> ModelDetails:
    """The version in an answer of ``/v1/models/NAME``; raises ``InvalidAnswer``."""
    answer = _object(_decoded(body), "the answer")
    canary = _optional(answer, "canary", dict)
    return ModelDetails(
        **_summary(answer),
        canary=None
        if canary is None
        else Canary(_whole(canary, "version"), _number(canary, "share"), _number(canary, "shadow")),
        labels=tuple(_checked(each, str, "labels") for each in _list(answer, "labels")),
        metrics=_numbers(answer, "metrics"),
        manifest_sha256=_text(answer, "manifest_sha256"),
    )


def read_metadata(body: bytes) -> Metadata:
    """The version in an answer of ``/v2/models/NAME``; raises ``InvalidAnswer``."""
    answer = _object(_decoded(body), "the answer")
    parameters = _object(_field(answer, "parameters"), "parameters")
    return Metadata(
        name=_text(answer, "name"),
        alias=_optional(parameters, "alias", str),
        device=_text(parameters, "device"),
        plan=_text(parameters, "plan"),
        labels=tuple(_checked(each, str, "labels") for each in _list(parameters, "labels")),
    )


def _prediction(value: Any) -> Prediction:
    record = _object(value, "predictions")
    return Prediction(
        _text(record, "label"), _whole(record, "index"), _number(record, "probability")
    )


def _summary(record: dict[str, Any]) -> dict[str, Any]:
    texts = ("alias", "device", "plan", "error")
    return {
        "name": _text(record, "name"),
        "wanted": _text(record, "wanted"),
        "ready": _checked(_field(record, "ready"), bool, "ready"),
        "version": _optional(record, "version", int),
        **{name: _optional(record, name, str) for name in texts},
    }


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidAnswer(
            f"the answer is not JSON ({body[:40]!r}…); is this the URL of a Convoy service?"
        ) from error


def _object(value: Any, where: str) -> dict[str, Any]:
    return _checked(value, dict, where)


def _checked(value: Any, kind: type[T], where: str) -> T:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InvalidAnswer(
            f"the answer's {where} is {repr(value)[:40]}, which is not of type {kind.__name__}"
        )
    return value


def _field(record: dict[str, Any], name: str) -> Any:
    if name not in record:
        raise InvalidAnswer(f"the answer has no {name}; is this the URL of a Convoy service?")
    return record[name]


def _text(record: dict[str, Any], name: str) -> str:
    return _checked(_field(record, name), str, name)


def _whole(record: dict[str, Any], name: str) -> int:
    return _checked(_field(record, name), int, name)


def _number(record: dict[str, Any], name: str) -> float:
    value = _field(record, name)
    try:
        return float(value if isinstance(value, float) else _checked(value, int, name))
    except OverflowError as error:
        raise InvalidAnswer(f"the answer's {name} is a number with too many digits") from error


def _list(record: dict[str, Any], name: str) -> list[Any]:
    return _checked(_field(record, name), list, name)


def _numbers(record: dict[str, Any], name: str) -> dict[str, float]:
    found = _object(_field(record, name), name)
    return {key: _number(found, key) for key in found}


def _optional(record: dict[str, Any], name: str, kind: type[T]) -> T | None:
    value = _field(record, name)
    return None if value is None else _checked(value, kind, name)
