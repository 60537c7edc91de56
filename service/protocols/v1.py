"""``POST /v1/classify``, Convoy's own protocol: takes images, answers their likeliest classes."""

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import msgspec
from flask import Response
from msgspec import Struct
from werkzeug.exceptions import abort

from registry.model.classifier import top_classes
from registry.model.manifest import ClassScore
from service.http import problems
from service.http.bodies.body_images import BodyImages
from service.http.openapi import FAILURES, IMAGES, Operation
from service.inference.requests import (
    DEFAULT_TOP_K,
    Probabilities,
    Result,
    Target,
    Timings,
)
from service.protocols.inference_app import HttpAnswer
from service.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_PATH = re.compile(
    r"/v1(?:/models/(?P<name>[^/]+)(?:/versions/(?P<version>[0-9]{1,9})|/aliases/(?P<alias>[^/]+))?)?"
    r"/classify/?"
)
TOP_K = {
    "name": "top_k",
    "in": "query",
    "description": "How many classes to answer with, best first (default 5).",
    "schema": {"type": "integer", "minimum": 1, "maximum": 10_000, "default": DEFAULT_TOP_K},
    "example": 2,
}
_encode = msgspec.json.Encoder().encode


class ModelName(Struct, frozen=True):
    """The version that answered."""

    name: str
    version: int
    alias: str | None


class Item(Struct, frozen=True, omit_defaults=True):
    """One image of several: its predictions or its error."""

    predictions: list[ClassScore] | None = None
    error: dict[str, Any] | None = None


class Answer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of an answer: ``results`` if the client sent a list, otherwise ``predictions``."""

    model: ModelName
    predictions: list[ClassScore] | None = None
    results: list[Item] | None = None
    request_id: str
    timings_ms: Timings


_EXAMPLE = Answer(
    model=ModelName("fashion", 1, "champion"),
    predictions=[ClassScore("Ankle boot", 9, 0.9999), ClassScore("Sneaker", 7, 0.0001)],
    request_id="54f7700bb1144debb775f84b48fc6692",
    timings_ms=Timings(0.266, 0.024, 1.484, 2.131),
)


class V1:
    """Translates ``/v1/classify``; see docs/api.md."""

    name = "v1"
    methods: tuple[str, ...] = ("POST",)
    operations: tuple[Operation, ...] = tuple(
        Operation(
            method="post",
            path=f"{prefix}/classify",
            summary="Classify one image or several. Answers the most probable classes, best first.",
            answer=Answer,
            example=_EXAMPLE,
            body=IMAGES,
            query=(TOP_K,),
            failures=FAILURES,
        )
        for prefix in (
            "/v1",
            "/v1/models/{name}",
            "/v1/models/{name}/versions/{version}",
            "/v1/models/{name}/aliases/{alias}",
        )
    )

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def match(self, path: str) -> Target | None:
        """The target of a path that ends in ``/classify``; None for other paths."""
        found = _PATH.fullmatch(path) if path.endswith(("/classify", "/classify/")) else None
        if found is None:
            return None
        name, version, alias = found.groups()
        return Target(name, int(version) if version else None, alias)

    def read(self, environ: "WSGIEnvironment") -> "V1Request":
        """The request, whose body is read when its images are iterated.

        Raises:
            HTTPException: 400, ``top_k`` is not a whole number from 1 to 10,000.
        """
        query = environ.get("QUERY_STRING")
        top_k = _top_k(query) if query else DEFAULT_TOP_K
        return V1Request(environ, self._settings, top_k)

    def refuse(self, error: Exception, request_id: str) -> Response:
        """Problem JSON."""
        return problems.answer(error, request_id)


class V1Request(BodyImages):
    """One request: its images, and how many classes the client wants for each."""

    def __init__(self, environ: "WSGIEnvironment", settings: Settings, top_k: int) -> None:
        super().__init__(environ, settings)
        self._top_k = top_k

    def write(self, result: Result, request_id: str) -> HttpAnswer:
        """An ``Answer`` as JSON in UTF-8.

        One image has its classes in ``predictions``. Several have one item each in ``results``, in
        the order of the request: classes, or an ``error``.
        """
        served, many = result.served, self.many
        items = [self._item(each, served.manifest.labels, request_id) for each in result.images]
        answer = Answer(
            model=ModelName(served.name, served.version, served.alias),
            predictions=None if many else items[0].predictions,
            results=items if many else None,
            request_id=request_id,
            timings_ms=result.timings_ms,
        )
        return HttpAnswer(_encode(answer))

    def _item(
        self, image: Probabilities | Exception, labels: tuple[str, ...], request_id: str
    ) -> Item:
        if isinstance(image, Exception):
            return Item(error=problems.as_item(image, request_id))
        return Item(predictions=top_classes(image, labels, self._top_k))


def _top_k(query: str) -> int:
    text = parse_qs(query, keep_blank_values=True).get("top_k", [str(DEFAULT_TOP_K)])[0]
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 10_000:
        abort(400, f"top_k is {text[:40]!r}; it must be a whole number from 1 to 10000")
    return int(text)
