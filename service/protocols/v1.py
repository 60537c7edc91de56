"""``POST /v1/classify``: encoded images in, the most probable classes out.

The one route that is hot, and so the one that stands before Flask and not in it: on a 28×28 picture
Flask's own machinery costs more than decoding and the network together (docs/decisions/0007). It is
a WSGI application that does its work in two parts. Called, it decodes and queues the images;
iterated, it waits for their scores and answers. A server that calls it for many requests before it
iterates any gets them into one batch.
"""

import logging
import random
import re
import time
from collections.abc import Iterable, Iterator
from threading import Semaphore
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import msgspec
import numpy as np
from msgspec import Struct
from werkzeug.exceptions import MethodNotAllowed, abort

from registry.core.errors import ConvoyError, ImageTooLarge, Overloaded
from registry.model.image.decode import Pixels, decode_image
from registry.model.image.structure import check_parts
from registry.model.manifest import ClassScore, PreprocessSpec
from registry.model.refs import Trial
from service.http import problems
from service.http.bodies import Images
from service.http.request_context import answer_headers, identify
from service.inference.batcher import MicroBatcher, Scored, Ticket
from service.inference.loaded_model import ServedModel
from service.inference.traffic_split import is_challengers
from service.malloc import give_back
from service.observability.metrics import Answered
from service.server.protocol import IN_LOOP, WAITING, Postpone
from service.shadow.client import Sample
from service.state import State

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

DEFAULT_TOP_K = 5
# Reading and decoding the images of one request may take so long of a worker's loop.
LOOP_DECODE_S = 0.01
LOOP_BYTES = 64 * 1024
# A slower network would keep the loop from reading probes, and from refusing others.
LOOP_IMAGE_MS = 2.0
LOOP_WAIT_S = 0.02
LARGE_AT_ONCE = 1
LARGE_WAIT_S = 1.0
# Each that waits has one of the worker's threads; so many are left to other requests.
FREE_THREADS = 2
# The loop answers these itself, so that no crowd on other routes holds them up.
PROBES = {"/livez", "/readyz", "/healthz"}
_PATH = re.compile(
    r"/v1(?:/models/(?P<name>[^/]+)(?:/versions/(?P<version>[0-9]{1,9})|/aliases/(?P<alias>[^/]+))?)?"
    r"/classify/?"
)
# When a request came: one that was postponed comes twice, and is counted once.
CALLED = "convoy.called"
_encode = msgspec.json.Encoder().encode


class ModelName(Struct, frozen=True):
    """Who answered."""

    name: str
    version: int
    alias: str | None


class Result(Struct, frozen=True, omit_defaults=True):
    """One image among many: its predictions or its error."""

    predictions: list[ClassScore] | None = None
    error: dict[str, Any] | None = None


class Timings(Struct, frozen=True):
    """Milliseconds of the stages; of many images the longest."""

    decode: float
    queue: float
    forward: float
    total: float


class Answer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of an answer; ``results`` when the caller sent a list."""

    model: ModelName
    predictions: list[ClassScore] | None = None
    results: list[Result] | None = None
    request_id: str
    timings_ms: Timings


class Job:
    """One request on its way: what is known once its images are queued."""

    def __init__(self, request_id: str, trace_id: str | None) -> None:
        self.request_id = request_id
        self.trace_id = trace_id
        self.started = time.perf_counter()
        self.served: ServedModel | None = None
        self.top_k = DEFAULT_TOP_K
        self.many = False
        self.read_s = 0.0
        self.decode_s = 0.0
        self.tickets: list[Ticket | Exception] = []
        # For the shadow: who scores there, and of each image what it needs for that.
        self.challenger: ServedModel | None = None
        self.samples: list[Pixels | bytes | Exception] = []


class Classify:
    """Answers classifications, and gives every other request to ``app``."""

    def __init__(self, app: "WSGIApplication", state: State) -> None:
        self._app = app
        self._state = state
        self._large = Semaphore(LARGE_AT_ONCE)
        self._large_or_waiting = Semaphore(max(1, state.settings.threads - FREE_THREADS))
        self._sticky = "HTTP_" + state.settings.sticky_header.upper().replace("-", "_")

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        target = _PATH.fullmatch(path) if path.endswith(("/classify", "/classify/")) else None
        if target is None:
            is_probe = path in PROBES and environ["REQUEST_METHOD"] in ("GET", "HEAD")
            if IN_LOOP in environ and not is_probe:
                raise Postpone(background=True)
            return self._app(environ, start_response)
        job = Job(*identify(environ))
        try:
            self._queue(job, environ, target)
        except Postpone:
            raise
        except Exception as error:  # noqa: BLE001 - the edge of a request: every error is an answer
            method = environ["REQUEST_METHOD"]
            return self._refuse(job, target["name"], error, start_response, method)
        return self._answer(job, start_response)

    def _queue(self, job: Job, environ: "WSGIEnvironment", target: re.Match[str]) -> None:
        """Everything up to the queue: which version, which images, their pixels."""
        name, version, alias = target.groups()
        if environ["REQUEST_METHOD"] != "POST":
            raise MethodNotAllowed(["POST"])
        in_loop = IN_LOOP in environ
        self._state.door.admit(environ, again=CALLED in environ)
        job.started = environ.setdefault(CALLED, job.started)
        if in_loop and self._state.slot(name).current is None:
            raise Postpone  # it may have to be loaded first
        # Read once: one request, one version.
        job.served, serving = self._state.served(name, int(version) if version else None, alias)
        batcher = job.served.batcher
        # Before it is decoded: that would be for nothing.
        batcher.check_room(environ.get(WAITING, 0))
        if in_loop and _is_slow(batcher):
            raise Postpone(queues=True)
        if in_loop and environ[IN_LOOP] > LOOP_BYTES:
            raise Postpone
        trial = None if version or alias else serving.trial
        if query := environ.get("QUERY_STRING"):
            job.top_k = _top_k(query)
        settings = self._state.settings
        images = Images(environ, settings)
        decoded: list[Pixels | Exception] = []
        reading = time.perf_counter()
        for image in images:
            if trial is not None and not decoded:
                self._choose_side(job, trial, serving.challenger, image, environ)
                if in_loop and _is_slow(job.served.batcher):
                    raise Postpone(queues=True)  # of the challenger's
            decoding = time.perf_counter()
            job.read_s += decoding - reading
            if in_loop and job.read_s + job.decode_s > LOOP_DECODE_S:
                raise Postpone
            decoded.append(self._decode(image, job.served, in_loop))
            if job.challenger is not None:
                alike = job.challenger.manifest.preprocess == job.served.manifest.preprocess
                job.samples.append(decoded[-1] if alike else image)
            reading = time.perf_counter()
            job.decode_s += reading - decoding
        job.many = images.many
        pixels = [each for each in decoded if not isinstance(each, Exception)]
        if isinstance(decoded[0], Exception) and not job.many:
            raise decoded[0]
        left_s = settings.deadline_s - (time.perf_counter() - job.started)
        tickets = iter(job.served.batcher.put(pixels, left_s) if pixels else ())
        job.tickets = [each if isinstance(each, Exception) else next(tickets) for each in decoded]

    def _choose_side(
        self,
        job: Job,
        trial: Trial,
        challenger: ServedModel | None,
        image: bytes | ConvoyError,
        environ: "WSGIEnvironment",
    ) -> None:
        """Who answers, by the caller's header or the first image, and who else scores."""
        header = environ.get(self._sticky)
        key = header.encode() if header else b"" if isinstance(image, ConvoyError) else image
        if is_challengers(trial, key):
            job.served = challenger
        elif random.random() < trial.shadow:  # noqa: S311 - a sample, no secret
            job.challenger = challenger

    def _decode(
        self, image: bytes | ConvoyError, served: ServedModel, in_loop: bool
    ) -> Pixels | Exception:
        """Pixels, or why the image has none; ``Postpone`` when decoding is not for the loop."""
        if isinstance(image, ConvoyError):
            return image
        settings, spec = self._state.settings, served.manifest.preprocess
        limits = settings.loop_decode_limits if in_loop else settings.common_decode_limits
        try:
            return decode_image(image, spec, limits)
        except ImageTooLarge as error:
            if in_loop:
                raise Postpone from error
            return self._decode_large(image, spec)
        except ConvoyError as error:
            return _without_frames(error)

    def _decode_large(self, image: bytes, spec: PreprocessSpec) -> Pixels | Exception:
        """One at a time, so that large images take neither all memory nor all threads."""
        try:
            # Before it waits: an image that is refused takes no other's place.
            check_parts(image, self._state.settings.decode_limits)
        except ConvoyError as error:
            return _without_frames(error)
        if not self._large_or_waiting.acquire(blocking=False):
            return Overloaded("too many large images are being decoded")
        try:
            return self._decode_alone(image, spec)
        finally:
            self._large_or_waiting.release()

    def _decode_alone(self, image: bytes, spec: PreprocessSpec) -> Pixels | Exception:
        if not self._large.acquire(timeout=LARGE_WAIT_S):
            return Overloaded("too many large images are being decoded")
        try:
            return decode_image(image, spec, self._state.settings.decode_limits)
        except ConvoyError as error:
            return _without_frames(error)
        finally:
            give_back()  # else the heap keeps what the largest picture took
            self._large.release()

    def _answer(self, job: Job, start_response: "StartResponse") -> Iterator[bytes]:
        """The second part: it begins when it is first iterated."""
        assert job.served is not None
        try:
            body = self._finish(job, job.served)
        except Exception as error:  # noqa: BLE001 - the edge of a request: every error is an answer
            yield from self._refuse(job, job.served.name, error, start_response)
            return
        start_response(
            "200 OK",
            [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                *answer_headers(job.request_id, job.served.version),
            ],
        )
        yield body

    def _finish(self, job: Job, served: ServedModel) -> bytes:
        """Wait for the scores of the job's images; the answer's body, noted in the metrics."""
        scored = [
            each if isinstance(each, Exception) else served.batcher.wait(each)
            for each in job.tickets
        ]
        if not job.many and isinstance(scored[0], Exception):
            raise scored[0]
        encoding = time.perf_counter()
        answer = _describe(job, served, scored)
        body = _encode(answer)
        done = time.perf_counter()
        best = _best(answer)
        failures = [outcome for each in scored if (outcome := _failure(each)) is not None]
        if failures:  # a list is one request: what failed of it by our fault must show
            self._state.metrics.refused(served.name, served.version, failures[0])
        else:
            self._state.metrics.answered(
                served.name,
                served.version,
                Answered(
                    images=sum(each is not None for each in best),
                    read_s=job.read_s,
                    decode_s=job.decode_s,
                    queue_s=answer.timings_ms.queue / 1000,
                    encode_s=done - encoding,
                    total_s=done - job.started,
                    confidence=sum(each.probability for each in best if each),
                ),
            )
        if job.challenger:
            self._shadow(job.challenger, job.samples, best)
        if log.isEnabledFor(logging.DEBUG):
            _log(job, served, scored, answer.timings_ms)
        return body

    def _shadow(
        self,
        challenger: ServedModel,
        samples: list[Pixels | bytes | Exception],
        best: list[ClassScore | None],
    ) -> None:
        """Have the challenger score what the champion did; nobody waits for it."""
        for image, answered in zip(samples, best, strict=True):
            if answered is not None and not isinstance(image, Exception):
                data = image if isinstance(image, bytes) else image.tobytes()
                self._state.shadow.send(
                    Sample(challenger.name, challenger.version, answered.index, data is image, data)
                )

    def _refuse(
        self,
        job: Job,
        name: str | None,
        error: Exception,
        start_response: "StartResponse",
        method: str = "POST",
    ) -> Iterable[bytes]:
        name = name or next(iter(self._state.slots))
        known = name if name in self._state.slots else ""
        served = job.served
        self._state.metrics.refused(
            served.name if served else known,
            served.version if served else None,
            problems.outcome(error),
        )
        response = problems.answer(error, job.request_id)
        error.__traceback__ = None  # its frames hold the body, and may hold the error
        response.headers.update(answer_headers(job.request_id, served.version if served else None))
        return response({"REQUEST_METHOD": method}, start_response)


def _without_frames(error: ConvoyError) -> ConvoyError:
    """``error`` to be kept as an image's outcome.

    Its traceback has the frames that hold the request's body and the list of outcomes: in that
    cycle of references, bodies would live until the next garbage collection.
    """
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


def _is_slow(batcher: MicroBatcher) -> bool:
    """Whether this version's images are not for the loop, which has others to answer."""
    return batcher.image_ms > LOOP_IMAGE_MS or batcher.wait_s() > LOOP_WAIT_S


def _top_k(query: str) -> int:
    text = parse_qs(query, keep_blank_values=True).get("top_k", [str(DEFAULT_TOP_K)])[0]
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 10_000:
        abort(400, f"top_k is {text[:40]!r}; it must be a whole number from 1 to 10000")
    return int(text)


def _describe(job: Job, served: ServedModel, scored: list[Scored | Exception]) -> Answer:
    good = [each for each in scored if isinstance(each, Scored)]
    single = None if job.many else _predictions(good[0], served, job.top_k)
    results = [_result(each, served, job) for each in scored] if job.many else None
    return Answer(
        model=ModelName(served.name, served.version, served.alias),
        predictions=single,
        results=results,
        request_id=job.request_id,
        timings_ms=Timings(
            round(job.decode_s * 1000, 3),
            round(max((each.queue_ms for each in good), default=0.0), 3),
            round(max((each.forward_ms for each in good), default=0.0), 3),
            round((time.perf_counter() - job.started) * 1000, 3),
        ),
    )


def _result(scored: Scored | Exception, served: ServedModel, job: Job) -> Result:
    if isinstance(scored, Exception):
        return Result(error=problems.as_item(scored, job.request_id))
    return Result(predictions=_predictions(scored, served, job.top_k))


def _failure(scored: Scored | Exception) -> str | None:
    """Whose fault an image's error is, unless there is none or it is the caller's."""
    outcome = problems.outcome(scored) if isinstance(scored, Exception) else "caller"
    return None if outcome == "caller" else outcome


def _best(answer: Answer) -> list[ClassScore | None]:
    """The most probable class of each image; None of one that has an error instead."""
    if answer.results is None:
        return [answer.predictions[0]] if answer.predictions else [None]
    return [each.predictions[0] if each.predictions else None for each in answer.results]


def _predictions(scored: Scored, served: ServedModel, top_k: int) -> list[ClassScore]:
    """The ``top_k`` most probable classes, best first; equal ones in label order."""
    probabilities, labels = scored.probabilities, served.manifest.labels
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [
        ClassScore(labels[index], index, value)
        for index, value in zip(order.tolist(), probabilities[order].tolist(), strict=True)
    ]


def _log(
    job: Job, served: ServedModel, scored: list[Scored | Exception], timings_ms: Timings
) -> None:
    log.debug(
        "classified",
        extra={
            "request_id": job.request_id,
            "trace_id": job.trace_id,
            "model_name": served.name,
            "model_version": served.version,
            "images": len(scored),
            "batch_size": max((s.batch_size for s in scored if isinstance(s, Scored)), default=0),
            "decode_ms": timings_ms.decode,
            "queue_ms": timings_ms.queue,
            "forward_ms": timings_ms.forward,
        },
    )
