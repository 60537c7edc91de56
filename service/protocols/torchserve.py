"""``POST /predictions/{model}``: TorchServe's inference API, for existing TorchServe clients.

A client sends an image, and gets an object of its most probable labels, as TorchServe's
``image_classifier`` answers (https://docs.pytorch.org/serve/inference_api.html). PUT works too,
because ``curl -T`` sends it. Errors are problem JSON, as everywhere in Convoy.
"""

import re
from typing import TYPE_CHECKING, Any

import msgspec
from flask import Response
from msgspec.structs import replace

from registry.model.classifier import top_classes
from service.http import problems
from service.http.bodies.body_images import IMAGE_NAME, BodyImages
from service.http.openapi import FAILURES, IMAGES, Operation
from service.inference.requests import (
    DEFAULT_TOP_K,
    Probabilities,
    Result,
    Target,
)
from service.protocols.inference_app import HttpAnswer
from service.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_PATH = re.compile(r"/predictions/(?P<name>[^/]+)(?:/(?P<version>[0-9]{1,9}))?/?")

# TorchServe's handlers read the parts `data` and `body`.
_PART_NAME = re.compile(rf"data|body|{IMAGE_NAME.pattern}", re.ASCII)
_PUT = replace(IMAGES, command="curl -s -T picture.png")


class TorchServe:
    """Translates ``/predictions``.

    TorchServe takes one image a request. Here a client may send several, and gets a list.
    """

    name = "torchserve"
    methods: tuple[str, ...] = ("POST", "PUT")
    operations: tuple[Operation, ...] = tuple(
        Operation(
            method=method,
            path=path,
            summary="Classify one image as TorchServe does: an object of labels.",
            answer=dict[str, float] | list[dict[str, Any]],
            example={"Ankle boot": 0.9999, "Sneaker": 0.0001},
            body=IMAGES if method == "post" else _PUT,
            failures=FAILURES,
        )
        for path in ("/predictions/{name}", "/predictions/{name}/{version}")
        for method in ("post", "put")
    )

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def match(self, path: str) -> Target | None:
        """The target of ``/predictions/NAME`` or ``…/NAME/VERSION``; None for other paths."""
        found = _PATH.fullmatch(path) if path.startswith("/predictions/") else None
        if found is None:
            return None
        return Target(found["name"], int(found["version"]) if found["version"] else None)

    def read(self, environ: "WSGIEnvironment") -> "TorchServeRequest":
        """The request, whose body is read when its images are iterated."""
        return TorchServeRequest(environ, self._settings, _PART_NAME)

    def refuse(self, error: Exception, request_id: str) -> Response:
        """Problem JSON."""
        return problems.answer(error, request_id)


class TorchServeRequest(BodyImages):
    """One request: its images."""

    def write(self, result: Result, request_id: str) -> HttpAnswer:
        """JSON in UTF-8: probabilities by label for one image, a list of these for several.

        In a list, an image that failed has an object with the member ``error`` instead.
        """
        labels = result.served.manifest.labels
        items = [_item(each, labels, request_id) for each in result.images]
        return HttpAnswer(msgspec.json.encode(items if self.many else items[0]))


def _item(
    image: Probabilities | Exception, labels: tuple[str, ...], request_id: str
) -> dict[str, object]:
    if isinstance(image, Exception):
        return {"error": problems.as_item(image, request_id)}
    return {each.label: each.probability for each in top_classes(image, labels, DEFAULT_TOP_K)}
