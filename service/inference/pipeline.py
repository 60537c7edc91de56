"""``Pipeline``: the only way from images to probabilities.

It chooses the version, decodes the images, queues them, waits for the scores, counts, and sends
copies to the shadow. It knows no HTTP: a protocol module makes a ``Request`` and writes the
``Result``. The work has two phases, ``submit`` and ``finish``. A server that submits many requests
before it finishes the first gets them into one batch.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from registry.core.errors import ConvoyError, InvalidTensor, ModelNotReady, VersionNotFound
from registry.model.image.decode import Pixels
from registry.model.refs import Canary
from service.inference.batcher import MicroBatcher, Prediction
from service.inference.decoding import Decoder
from service.inference.loaded_model import ActiveVersions, ServedModel, Slot, find_slot
from service.inference.requests import (
    AnsweredRequest,
    Counters,
    InputImage,
    Job,
    Result,
    Target,
    Timings,
)
from service.inference.traffic_split import routes_to_canary
from service.server.protocol import Postpone
from service.settings import Settings
from service.shadow.client import Sample, ShadowFeed

Answer = TypeVar("Answer")

# The longest that a worker's loop may spend on reading and decoding the images of one request.
LOOP_DECODE_S = 0.01
LOOP_BYTES = 64 * 1024
# While a slower network computes, the loop could neither answer probes nor refuse requests.
LOOP_IMAGE_MS = 2.0
LOOP_WAIT_S = 0.02


class Pipeline:
    """Answers requests with the loaded versions. Any thread may call any method."""

    def __init__(
        self,
        slots: Mapping[str, Slot],
        settings: Settings,
        counters: Counters,
        shadow: ShadowFeed,
        outcome: Callable[[Exception], str],
        why_unready: Callable[[], str | None],
    ) -> None:
        """Create a pipeline over ``slots``, the models by name.

        Args:
            slots: the first is the default model.
            settings: the deadline, and the limits of decoding.
            counters: where requests are counted.
            shadow: where copies of images go.
            outcome: gives an error's outcome in the metrics.
            why_unready: gives the reason why this worker must answer no more requests, or None.
        """
        self._slots = slots
        self._deadline_s = settings.deadline_s
        self._counters = counters
        self._shadow = shadow
        self._outcome = outcome
        self._why_unready = why_unready
        self._decoder = Decoder(settings)

    def find(self, target: Target, in_loop: bool = False) -> tuple[ServedModel, ActiveVersions]:
        """The loaded version that a request asks for, and all that serve at this moment.

        Raises:
            Postpone: the server's loop calls (``in_loop``), and no version is loaded yet.
            ModelNotFound, VersionNotFound: this service does not serve it.
            ModelNotReady: no version is loaded yet, or this worker is about to end.
        """
        if reason := self._why_unready():
            raise ModelNotReady(reason)
        slot = find_slot(self._slots, target.name)
        serving = slot.serving if in_loop else slot.require()
        if serving is None:
            raise Postpone  # ``require`` may have to load the model first
        served = serving.find(target.version, target.alias)
        if served is None:
            alias = target.alias
            wanted = f"version {target.version}" if alias is None else f"alias {alias[:80]!r}"
            here = " and ".join(
                f"version {each.version}" + (f", alias {each.alias!r}" if each.alias else "")
                for each in (serving.champion, serving.challenger)
                if each
            )
            raise VersionNotFound(
                f"{serving.champion.name} {wanted} is not served here; this service has {here}"
            )
        return served, serving

    def submit(self, job: Job) -> None:
        """The first phase: choose the version, decode the images, queue their pixels.

        ``job.served`` is the chosen version, even if this raises after choosing it.

        Raises:
            Postpone: the server's loop called, and this would take too long for it.
            ConvoyError: the request cannot be answered.
        """
        request = job.request
        in_loop = request.loop_bytes is not None
        # Find the version once, so that all images of a request get the same one.
        job.served, serving = self.find(request.target, in_loop)
        # Check before decoding, which costs more than the check.
        job.served.batcher.check_room(request.waiting)
        if in_loop and _is_slow(job.served.batcher):
            raise Postpone(queues=True)
        if request.loop_bytes is not None and request.loop_bytes > LOOP_BYTES:
            raise Postpone
        decoded = self._decode_all(job, serving)
        if not request.images.isolates_errors:
            _raise_first(decoded)
        job.queued = time.perf_counter()
        left_s = self._deadline_s - (job.queued - request.started)
        pixels = [each for each in decoded if not isinstance(each, Exception)]
        queued_images = iter(job.served.batcher.put(pixels, left_s) if pixels else ())
        job.queued_images = [
            each if isinstance(each, Exception) else next(queued_images) for each in decoded
        ]

    def finish(self, job: Job, write: Callable[[Result], Answer]) -> Answer:
        """The second phase: wait for the scores, encode them with ``write``, and count.

        Returns:
            What ``write`` returned.

        Raises:
            Exception: an image failed, and the request's images do not isolate errors.
        """
        served, request = job.served, job.request
        assert served is not None
        scored = [
            each if isinstance(each, Exception) else served.batcher.wait(each)
            for each in job.queued_images
        ]
        if not request.images.isolates_errors:
            failed = next((each for each in scored if isinstance(each, Exception)), None)
            if failed is not None:
                raise failed
        encoding = time.perf_counter()
        result = _result(job, served, scored)
        answer = write(result)
        done = time.perf_counter()
        best = [
            None if isinstance(each, Exception) else int(each.argmax()) for each in result.images
        ]
        job.answered = _answered(job, result, encoding, done)
        failures = filter(None, (self._failure(each) for each in scored))
        # A list counts as one request: it failed if one of its images did.
        if failure := next(failures, None):
            self._counters.refused(served.name, served.version, request.protocol, failure)
        else:
            self._counters.answered(served.name, served.version, job.answered)
        if job.challenger:
            self._send_to_shadow(job.challenger, job.samples, best)
        return answer

    def refuse(
        self, name: str | None, version: int | None, protocol: str, error: Exception
    ) -> None:
        """Count a request for ``name``, or the default model, that failed with ``error``."""
        name = name or next(iter(self._slots))
        known = name if name in self._slots else ""
        self._counters.refused(known, version, protocol, self._outcome(error))

    def _decode_all(self, job: Job, serving: ActiveVersions) -> list[Pixels | Exception]:
        """The pixels or the error of each image; the first image's bytes may choose the version."""
        request = job.request
        canary = None if request.target.version or request.target.alias else serving.canary
        in_loop = request.loop_bytes is not None
        decoded: list[Pixels | Exception] = []
        reading = time.perf_counter()
        for image in request.images:
            if canary is not None and not decoded:
                _choose_side(job, canary, serving.challenger, image)
                if in_loop and _is_slow(job.served.batcher):  # type: ignore[union-attr]
                    raise Postpone(queues=True)  # the challenger is too slow for the loop
            assert job.served is not None
            decoding = time.perf_counter()
            job.decode_started = job.decode_started or decoding
            job.read_s += decoding - reading
            if in_loop and job.read_s + job.decode_s > LOOP_DECODE_S:
                raise Postpone
            spec = job.served.manifest.preprocess
            decoded.append(self._decoder.decode(image, spec, in_loop))
            if job.challenger is not None:
                alike = job.challenger.manifest.preprocess == spec
                job.samples.append(decoded[-1] if alike else _encoded(image))
            reading = time.perf_counter()
            job.decode_s += reading - decoding
        job.decode_ended = reading
        return decoded

    def _failure(self, scored: Prediction | Exception) -> str | None:
        """The outcome of a failed image in the metrics; None if it is ok or ``client_error``."""
        outcome = self._outcome(scored) if isinstance(scored, Exception) else "client_error"
        return None if outcome == "client_error" else outcome

    def _send_to_shadow(
        self,
        challenger: ServedModel,
        samples: Sequence[Pixels | bytes | Exception],
        best: Sequence[int | None],
    ) -> None:
        """Send the images that the champion answered to the shadow, without waiting for it.

        ``best`` are the indices of the champion's most probable classes.
        """
        for image, index in zip(samples, best, strict=True):
            if index is not None and not isinstance(image, Exception):
                data = image if isinstance(image, bytes) else image.tobytes()
                self._shadow.send(
                    Sample(challenger.name, challenger.version, index, data is image, data)
                )


def _is_slow(batcher: MicroBatcher) -> bool:
    """Whether this version is too slow for the loop, which has other connections to answer."""
    return batcher.image_ms > LOOP_IMAGE_MS or batcher.wait_s() > LOOP_WAIT_S


def _choose_side(
    job: Job, canary: Canary, challenger: ServedModel | None, image: InputImage | ConvoyError
) -> None:
    """Choose by the client's session, or else the first image, which version answers.

    If the champion does, choose at random whether the challenger scores the images as a shadow.
    """
    session = job.request.session
    if session:
        key = session.encode()
    elif isinstance(image, ConvoyError):
        key = b""
    else:
        key = image if isinstance(image, bytes) else image.tobytes()
    if routes_to_canary(canary, key):
        job.served = challenger
    elif random.random() < canary.shadow:  # noqa: S311 - a sample, not a secret
        job.challenger = challenger


def _encoded(image: InputImage | ConvoyError) -> bytes | ConvoyError:
    """The image for a challenger that preprocesses differently, or the reason why it gets none."""
    if isinstance(image, np.ndarray):
        return InvalidTensor("the challenger takes tensors of another form")
    return image


def _raise_first(decoded: Sequence[Pixels | Exception]) -> None:
    """Raise the first error; if there are several images, its text gets the image's position."""
    for position, each in enumerate(decoded):
        if isinstance(each, Exception):
            if len(decoded) > 1:
                each.add_note(f"image {position}")
            raise each


def _answered(job: Job, result: Result, encoding: float, done: float) -> AnsweredRequest:
    """The figures of a request whose answer was written between ``encoding`` and ``done``."""
    good = [each for each in result.images if not isinstance(each, Exception)]
    return AnsweredRequest(
        protocol=job.request.protocol,
        images=len(good),
        batch_size=result.batch_size,
        read_s=job.read_s,
        decode_s=job.decode_s,
        queue_s=result.timings_ms.queue / 1000,
        forward_s=result.timings_ms.forward / 1000,
        encode_s=done - encoding,
        total_s=done - job.request.started,
        confidences=[float(each.max()) for each in good],
        started=job.request.started,
        decode_started=job.decode_started,
        decode_ended=job.decode_ended,
        queued=job.queued,
    )


def _result(job: Job, served: ServedModel, scored: list[Prediction | Exception]) -> Result:
    good = [each for each in scored if isinstance(each, Prediction)]
    timings = Timings(
        round(job.decode_s * 1000, 3),
        round(max((each.queue_ms for each in good), default=0.0), 3),
        round(max((each.forward_ms for each in good), default=0.0), 3),
        round((time.perf_counter() - job.request.started) * 1000, 3),
    )
    return Result(
        served=served,
        images=[each if isinstance(each, Exception) else each.row for each in scored],
        timings_ms=timings,
        batch_size=max((each.batch_size for each in good), default=0),
    )
