"""``POST /v1/classify``: encoded images in, the most probable classes out."""

import base64
import binascii
import logging
import time
from typing import Any

import msgspec
from flask import Blueprint, Response, abort, g, request

from registry.contract import ClassScore, top_scores
from registry.errors import ConvoyError, ImageTooLarge, InvalidImage
from registry.preprocess import Pixels, decode_image
from service import errors
from service.batcher import Scored
from service.model_slot import ServedModel
from service.requests import read_body, require_length
from service.state import State, state

log = logging.getLogger(__name__)
blueprint = Blueprint("classify", __name__)

DEFAULT_TOP_K = 5


class JsonBody(msgspec.Struct, forbid_unknown_fields=True):
    """``{"image": "<base64>"}`` or ``{"images": ["<base64>", …]}``."""

    image: str | None = None
    images: list[str] | None = None


class Body(msgspec.Struct, frozen=True):
    """The images of a request; ``many`` when the caller sent a list, so gets a list."""

    images: list[bytes | InvalidImage]
    many: bool


@blueprint.post("/v1/classify")
@blueprint.post("/v1/models/<name>/classify")
@blueprint.post("/v1/models/<name>/versions/<int:version>/classify")
@blueprint.post("/v1/models/<name>/aliases/<alias>/classify")
def classify(
    name: str | None = None, version: int | None = None, alias: str | None = None
) -> Response:
    """Answer with the ``top_k`` classes of each image, and with the version that found them."""
    started = time.perf_counter()
    current = state()
    model_name, model_version, outcome = name if name in current.slots else "", "", "ok"
    try:
        # Read once: one request, one version.
        served = g.served = current.served(name, version, alias)
        model_name, model_version = served.name, str(served.version)
        top_k = _top_k()
        body = _read_images(current)
        images, decode_ms = _decode(body.images, served, current)
        scored = _score(images, served, current)
        if not body.many and isinstance(scored[0], Exception):
            raise scored[0]
        answer = _answer(served, body.many, scored, top_k, decode_ms, started)
    except Exception as error:
        outcome = errors.outcome(error)
        raise
    finally:
        current.metrics.requests.labels(model_name, model_version, outcome).inc()
        if served := g.get("served"):
            current.metrics.queue_depth.labels(model_name).set(served.batcher.depth)
    _observe(current, served, scored, decode_ms, started)
    return Response(msgspec.json.encode(answer), mimetype="application/json")


def _top_k() -> int:
    text = request.args.get("top_k", str(DEFAULT_TOP_K))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 10_000:
        abort(400, f"top_k is {text[:40]!r}; it must be a whole number from 1 to 10000")
    return int(text)


def _read_images(current: State) -> Body:
    """The images in whichever of the body forms the caller chose."""
    kind = request.mimetype
    if kind == "multipart/form-data":
        require_length()
        return _multipart(current.settings.max_images)
    if kind == "application/json":
        return _json(read_body(), current.settings.max_images)
    # curl --data-binary says urlencoded unless it is told otherwise.
    raw = ("", "application/octet-stream", "application/x-www-form-urlencoded")
    if kind in raw or kind.startswith("image/"):
        return Body([read_body()], many=False)
    return abort(
        415,
        f"Content-Type {kind[:80]!r} is not accepted; send the image itself (image/* or "
        "application/octet-stream), multipart/form-data or application/json",
    )


def _multipart(max_images: int) -> Body:
    parts = request.files.getlist("image")
    if not parts:
        abort(400, "the multipart body has no file part named 'image'")
    if len(parts) > max_images:
        abort(413, f"{len(parts)} images in one request; at most {max_images} are accepted")
    return Body([part.read() for part in parts], many=len(parts) > 1)


def _json(body: bytes, max_images: int) -> Body:
    try:
        parsed = msgspec.json.decode(body, type=JsonBody)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        abort(400, f'the JSON body is not {{"image": …}} or {{"images": […]}}: {error}')
    if (parsed.image is None) == (parsed.images is None):
        abort(400, "the JSON body needs exactly one of 'image' and 'images'")
    if parsed.image is not None:
        return Body([_from_base64(parsed.image)], many=False)
    texts = parsed.images or []
    if not 1 <= len(texts) <= max_images:
        abort(
            413 if texts else 400,
            f"{len(texts)} images in one request; 1 to {max_images} are accepted",
        )
    return Body([_from_base64(text) for text in texts], many=True)


def _from_base64(text: str) -> bytes | InvalidImage:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        return InvalidImage(f"the image is not base64: {error}")


def _decode(
    images: list[bytes | InvalidImage], served: ServedModel, current: State
) -> tuple[list[Pixels | Exception], float]:
    """Pixels of each image, or why it has none; and how long that took, in ms."""
    started = time.perf_counter()
    decoded: list[Pixels | Exception] = []
    limit = current.settings.max_image_bytes
    for image in images:
        try:
            if isinstance(image, InvalidImage):
                raise image
            if len(image) > limit:
                raise ImageTooLarge(
                    f"the image has {len(image):,} bytes; at most {limit:,} are accepted"
                )
            decoded.append(
                decode_image(image, served.manifest.preprocess, current.settings.decode_limits)
            )
        except ConvoyError as error:
            decoded.append(error)
    return decoded, (time.perf_counter() - started) * 1000


def _score(
    images: list[Pixels | Exception], served: ServedModel, current: State
) -> list[Scored | Exception]:
    """Scores in the order of ``images``; what could not be decoded keeps its error."""
    good = [image for image in images if not isinstance(image, Exception)]
    if not good:
        return [image for image in images if isinstance(image, Exception)]
    scores = iter(served.batcher.submit(good, current.settings.deadline_s))
    return [image if isinstance(image, Exception) else next(scores) for image in images]


def _answer(
    served: ServedModel,
    many: bool,
    scored: list[Scored | Exception],
    top_k: int,
    decode_ms: float,
    started: float,
) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "model": {"name": served.name, "version": served.version, "alias": served.alias}
    }
    if many:
        answer["results"] = [
            {"error": errors.as_item(each)}
            if isinstance(each, Exception)
            else {"predictions": _predictions(each, served, top_k)}
            for each in scored
        ]
    elif isinstance(scored[0], Scored):
        answer["predictions"] = _predictions(scored[0], served, top_k)
    answer["request_id"] = g.request_id
    good = [each for each in scored if isinstance(each, Scored)]
    answer["timings_ms"] = {
        "decode": round(decode_ms, 3),
        "queue": round(max((each.queue_ms for each in good), default=0.0), 3),
        "forward": round(max((each.forward_ms for each in good), default=0.0), 3),
        "total": round((time.perf_counter() - started) * 1000, 3),
    }
    return answer


def _predictions(scored: Scored, served: ServedModel, top_k: int) -> list[ClassScore]:
    return top_scores(scored.probabilities.tolist(), served.manifest.labels, top_k)


def _observe(
    current: State,
    served: ServedModel,
    scored: list[Scored | Exception],
    decode_ms: float,
    started: float,
) -> None:
    """Metrics and one log line of a request that was answered."""
    metrics, labels = current.metrics, (served.name, str(served.version))
    metrics.request_seconds.labels(*labels).observe(time.perf_counter() - started)
    good = [each for each in scored if isinstance(each, Scored)]
    metrics.images.labels(*labels).inc(len(good))
    for each in good:
        metrics.stage_seconds.labels(*labels, "decode").observe(decode_ms / 1000 / len(scored))
        metrics.stage_seconds.labels(*labels, "queue").observe(each.queue_ms / 1000)
        metrics.stage_seconds.labels(*labels, "forward").observe(each.forward_ms / 1000)
        metrics.batch_size.labels(*labels).observe(each.batch_size)
    log.info(
        "classified",
        extra={
            "request_id": g.request_id,
            "trace_id": g.trace_id,
            "model_name": served.name,
            "model_version": served.version,
            "images": len(scored),
            "batch_size": max((each.batch_size for each in good), default=0),
            "decode_ms": round(decode_ms, 3),
            "queue_ms": round(max((each.queue_ms for each in good), default=0.0), 3),
            "forward_ms": round(max((each.forward_ms for each in good), default=0.0), 3),
        },
    )
