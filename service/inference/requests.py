"""What enters the pipeline and what leaves it, in no protocol's terms."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from registry.core.errors import ConvoyError
from registry.model.image.decode import Pixels
from service.inference.batcher import QueuedImage
from service.inference.loaded_model import ServedModel

DEFAULT_TOP_K = 5

InputImage = bytes | NDArray[Any]
"""An encoded picture; or one that the client has decoded (``registry.model.image.tensors``)."""

Probabilities = NDArray[np.float32]
"""The probability of each class, float32 (classes,), in the order of the manifest's labels."""


class Target(Struct, frozen=True):
    """The model that a client names, and the version or alias; None for the default."""

    name: str | None = None
    version: int | None = None
    alias: str | None = None


class ImageStream(Protocol):
    """The images of a request, one after the other as they arrive."""

    @property
    def isolates_errors(self) -> bool:
        """Whether an image that fails leaves the others' answers valid.

        If not, the whole request fails. The value is final once all images have arrived.
        """

    def __iter__(self) -> Iterator[InputImage | ConvoyError]:
        """Each image, or the error that occurred when it was read."""
        ...


class Request(Struct, frozen=True, kw_only=True):
    """A client's request.

    Attributes:
        images: the images to classify.
        protocol: the name of the protocol that the client speaks, for the metrics.
        target: the model. If it has neither version nor alias, the champion or the canary answers.
        session: requests with the same session get the same version during a canary.
        loop_bytes: the size of the body if the server's loop submits the request, which must not
            take long; None if a thread does.
        waiting: how many requests the server has postponed and will submit later.
        started: when the request arrived, by ``time.perf_counter``.
    """

    images: ImageStream
    protocol: str
    target: Target
    session: str | None = None
    loop_bytes: int | None = None
    waiting: int = 0
    started: float


class Job:
    """The state of one request between the pipeline's ``submit`` and ``finish``.

    It has many attributes because ``finish`` reports what ``submit`` did, and when.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.served: ServedModel | None = None
        self.read_s = 0.0
        self.decode_s = 0.0
        # Times of ``time.perf_counter``, for the request's trace.
        self.decode_started = self.decode_ended = self.queued = 0.0
        self.answered: AnsweredRequest | None = None
        self.queued_images: list[QueuedImage | Exception] = []
        # For the shadow: the challenger, and for each image its pixels, encoded bytes or error.
        self.challenger: ServedModel | None = None
        self.samples: list[Pixels | bytes | Exception] = []


class Timings(Struct, frozen=True):
    """Milliseconds of the stages. For several images, the longest queue and forward time."""

    decode: float
    queue: float
    forward: float
    total: float


class Result(Struct, frozen=True, kw_only=True):
    """The answer to a request, for a protocol module to write.

    Attributes:
        served: the version that answered.
        images: the probabilities of each image, or its error. Errors occur only if the request's
            ``ImageStream.isolates_errors`` is set.
        timings_ms: how long each stage of the request took.
        batch_size: the size of the largest batch that held one of the images.
    """

    served: ServedModel
    images: list[Probabilities | Exception]
    timings_ms: Timings
    batch_size: int

    def rows(self) -> list[Probabilities]:
        """The probabilities of the images that did not fail."""
        return [each for each in self.images if not isinstance(each, Exception)]


class AnsweredRequest(Struct, frozen=True, kw_only=True):
    """How one request was answered, for the metrics and its trace.

    It has many fields because each stage has its times.

    Attributes:
        protocol: the name of the client's protocol.
        images: how many images got predictions.
        batch_size: the size of the largest batch that held one of them.
        read_s: seconds that reading the images took.
        decode_s: seconds that decoding them took.
        queue_s: seconds in the queue, the longest of the images.
        forward_s: seconds of the forward pass, the longest of the images.
        encode_s: seconds that writing the answer took.
        total_s: seconds since the request arrived.
        confidences: the probability of the best class of each image.
        started: when the request arrived; this and the next three are times of
            ``time.perf_counter``.
        decode_started: when the first image began to be decoded.
        decode_ended: when the last image was decoded.
        queued: when the images were queued.
    """

    protocol: str
    images: int
    batch_size: int
    read_s: float
    decode_s: float
    queue_s: float
    forward_s: float
    encode_s: float
    total_s: float
    confidences: list[float]
    started: float
    decode_started: float
    decode_ended: float
    queued: float

    def stages(self) -> tuple[tuple[str, float, float], ...]:
        """Name, start and end of each stage, in order, by ``time.perf_counter``.

        With several images, ``decode`` lasts from the first to the last, and includes reading in
        between. ``queue`` takes as long as the image that waited longest, and ``forward`` as long
        as the longest forward pass, perhaps of another image. Both end before ``encode`` begins.
        """
        ended = self.started + self.total_s
        encode_started = ended - self.encode_s
        forward_started = min(self.queued + self.queue_s, encode_started)
        forward_ended = min(forward_started + self.forward_s, encode_started)
        return (
            ("decode", self.decode_started, self.decode_ended),
            ("queue", self.queued, forward_started),
            ("forward", forward_started, forward_ended),
            ("encode", encode_started, ended),
        )


class Counters(Protocol):
    """Counts requests."""

    def answered(self, name: str, version: int, request: AnsweredRequest) -> None:
        """Count a request that got predictions; ``version`` is the one that made them."""

    def refused(self, name: str, version: int | None, protocol: str, outcome: str) -> None:
        """Count a request that failed; ``outcome`` is one of the metrics' ``OUTCOMES``.

        ``name`` is "" and ``version`` None if they are not known.
        """
