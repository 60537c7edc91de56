"""``MicroBatcher``: concurrent callers share one forward pass. Knows no HTTP and no torch.

A caller puts images into the queue and waits for them later. The batcher has no timer and no thread
of its own. A waiting caller that finds the device idle runs a batch of the queued images. If the
device is busy, its images join a later batch, which the first waiting caller runs. So a lone
request does not wait, and load fills the batches. A thread may put many images before it waits for
the first.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import Event, Lock

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from registry.core.errors import DeadlineExceeded, DeviceLost, Overloaded
from registry.model.image.decode import Pixels

Compute = Callable[[Pixels], NDArray[np.float32]]
"""Turns uint8 (N, H, W, C) into float32 (N, values), a row for each image."""

OnBatch = Callable[[int, float, int], None]
"""Called with a batch's size, the seconds of its forward pass, and how many images still wait."""

# The weight of the newest batch in the running mean of the time that one image takes.
MEAN_SHARE = 0.2
# This many callers at once are ordinary. They are queued however slow the network is, if it can
# answer them within this share of the deadline. The rest is for decoding and for a busy machine.
ORDINARY_CALLERS = 64
DEADLINE_SHARE = 0.8
MIN_WAIT_LIMIT_S = 1.0


class Prediction(Struct, frozen=True):
    """The answer for one image: its row of ``compute``'s result, and the times that it took."""

    row: NDArray[np.float32]
    queue_ms: float
    forward_ms: float
    batch_size: int


class QueuedImage:
    """One queued image, for ``MicroBatcher.wait``."""

    __slots__ = ("deadline", "leads", "outcome", "pixels", "queued", "wake")

    def __init__(self, pixels: Pixels, queued: float, deadline: float) -> None:
        self.pixels = pixels
        self.queued = queued
        self.deadline = deadline
        self.outcome: Prediction | Exception | None = None
        # The thread that waits for this image sleeps on ``wake``; None while no thread does. If it
        # wakes without an outcome and ``leads`` is set, this thread runs the next batch.
        self.wake: Event | None = None
        self.leads = False


class BatchLimits(Struct, frozen=True, kw_only=True):
    """How large batches and queues may become.

    Attributes:
        max_batch: the most images in a batch.
        queue_limit: the most images that may wait.
        max_batch_compute_ms: a batch has only as many images as fit into this time.
        max_queue_delay_s: an image that would wait longer is refused. None derives the limit from
            the measured speed of the forward pass, so that ``ORDINARY_CALLERS`` are queued.
        deadline_s: the longest that callers wait.
    """

    max_batch: int
    queue_limit: int
    max_batch_compute_ms: float = 50.0
    max_queue_delay_s: float | None = None
    deadline_s: float = math.inf

    def wait_s(self, image_ms: float) -> float:
        """The longest expected wait, if the forward pass takes ``image_ms`` for one image."""
        if self.max_queue_delay_s is not None:
            return self.max_queue_delay_s
        ordinary_s = ORDINARY_CALLERS * image_ms / 1000
        return min(max(MIN_WAIT_LIMIT_S, ordinary_s), DEADLINE_SHARE * self.deadline_s)

    def images(self, image_ms: float) -> int:
        """The most images in a batch, if the forward pass takes ``image_ms`` for one."""
        if image_ms * self.max_batch <= self.max_batch_compute_ms:
            return self.max_batch
        return max(1, int(self.max_batch_compute_ms / image_ms))


class MicroBatcher:
    """Runs ``compute`` on batches of queued images. Any thread may call any public method."""

    def __init__(
        self,
        compute: Compute,
        limits: BatchLimits,
        on_batch: OnBatch = lambda size, forward_s, waiting: None,
    ) -> None:
        """Create a batcher with an empty queue, which calls ``on_batch`` after every batch."""
        self._compute = compute
        self._limits = limits
        self._on_batch = on_batch
        self._image_ms = 0.0
        self._running_since: float | None = None
        self._lock = Lock()
        self._waiting: deque[QueuedImage] = deque()
        self._busy = False

    @property
    def depth(self) -> int:
        """How many images are waiting."""
        return len(self._waiting)

    @property
    def image_ms(self) -> float:
        """Mean time that a forward pass takes for one image, lately; 0 before the first pass."""
        return self._image_ms

    def wait_s(self, known: int = 0) -> float:
        """Seconds that a new image would wait behind the queued images.

        ``known`` is how many requests the caller has yet to finish; it counts instead if it is
        more than the queued images, most of which belong to those requests.
        """
        return max(len(self._waiting), known) * self._image_ms / 1000

    @property
    def running_s(self) -> float:
        """Seconds for which the forward pass has been running; 0 when none is."""
        since = self._running_since
        return 0.0 if since is None else time.monotonic() - since

    def check_room(self, known: int = 0) -> None:
        """Raise ``Overloaded`` if a new image would wait too long (see ``wait_s``)."""
        if (wait_s := self.wait_s(known)) > self._limits.wait_s(self._image_ms):
            waiting = max(len(self._waiting), known)
            raise Overloaded(
                f"{waiting} images are already waiting; try again later", max(1, math.ceil(wait_s))
            )

    def put(self, images: Sequence[Pixels], deadline_s: float) -> list[QueuedImage]:
        """Queue ``images``; the caller must call ``wait`` for each queued image.

        Args:
            images: uint8 (H, W, C) each, at least one.
            deadline_s: seconds from now. An image whose batch has not started by then is not
                computed; a running forward pass is not cut short.

        Raises:
            Overloaded: the queue has no room for all of the images; none was queued.
        """
        self.check_room()
        now = time.monotonic()
        queued_images = [QueuedImage(pixels, now, now + deadline_s) for pixels in images]
        with self._lock:
            # A request larger than the queue limit may still run alone.
            if self._waiting and len(self._waiting) + len(queued_images) > self._limits.queue_limit:
                raise Overloaded(
                    f"{len(self._waiting)} images are already waiting; try again later"
                )
            self._waiting.extend(queued_images)
        return queued_images

    def wait(self, queued_image: QueuedImage) -> Prediction | Exception:
        """The scores of an image, or the error that it got instead, such as ``DeadlineExceeded``.

        Blocks until there is one or the other. Meanwhile the caller's thread may run batches.
        """
        while queued_image.outcome is None:
            with self._lock:
                if not self._busy:
                    self._busy = queued_image.leads = True
                elif queued_image.wake is None:
                    queued_image.wake = Event()
                    continue  # check again: before ``wake`` was set, no thread could wake this one
            if queued_image.leads:
                queued_image.leads = False
                self._run_batch()
                continue
            assert queued_image.wake is not None
            if queued_image.wake.wait(max(0.0, queued_image.deadline - time.monotonic())):
                queued_image.wake.clear()
            else:
                self._give_up(queued_image)
        return queued_image.outcome

    def _give_up(self, queued_image: QueuedImage) -> None:
        """Take an expired image out of the queue, unless its batch runs or its thread leads."""
        with self._lock:
            if queued_image.leads or queued_image.outcome is not None:
                return
            if queued_image in self._waiting:
                self._waiting.remove(queued_image)
                queued_image.outcome = _expired(queued_image)
                return
        assert queued_image.wake is not None
        queued_image.wake.wait()  # its batch is running, so an outcome will come

    def _run_batch(self) -> None:
        """Compute one batch, then hand the device to the first waiting thread."""
        batch: list[QueuedImage] = []
        try:
            with self._lock:
                now = time.monotonic()
                most = self._limits.images(self._image_ms)
                while self._waiting and len(batch) < most:
                    queued_image = self._waiting.popleft()
                    if queued_image.deadline > now:
                        batch.append(queued_image)
                    else:
                        _settle(queued_image, _expired(queued_image))
            if batch:
                self._score(batch)
        finally:
            for queued_image in batch:
                if queued_image.outcome is None:  # SystemExit, say, is ending this thread
                    _settle(queued_image, RuntimeError("the forward pass was interrupted"))
            with self._lock:
                successor = next((each for each in self._waiting if each.wake is not None), None)
                if successor is None:
                    self._busy = False
                else:
                    successor.leads = True
                    _wake(successor)

    def _score(self, batch: list[QueuedImage]) -> None:
        """Give every image of ``batch`` its outcome; if the batch fails, score each image alone."""
        started = self._running_since = time.monotonic()
        try:
            scores = self._compute(np.stack([queued_image.pixels for queued_image in batch]))
            if len(scores) != len(batch):
                raise RuntimeError(
                    f"the network returned {len(scores)} rows of scores for {len(batch)} images"
                )
        except DeviceLost as error:  # every image of the batch gets it: no retry can succeed
            for queued_image in batch:
                _settle(queued_image, error)
            return
        except Exception as error:  # noqa: BLE001 - the edge of a batch: errors stay in it
            if len(batch) > 1:
                for queued_image in batch:
                    self._score([queued_image])
            else:
                _settle(batch[0], error)
            return
        finally:
            self._running_since = None
        forward_s = time.monotonic() - started
        image_ms = forward_s * 1000 / len(batch)
        mean_ms = self._image_ms or image_ms
        self._image_ms = mean_ms + MEAN_SHARE * (image_ms - mean_ms)
        self._on_batch(len(batch), forward_s, len(self._waiting))
        finite = np.isfinite(scores).all(axis=1)
        for queued_image, row, is_finite in zip(batch, scores, np.atleast_1d(finite), strict=True):
            if is_finite:
                queue_ms = (started - queued_image.queued) * 1000
                _settle(queued_image, Prediction(row, queue_ms, forward_s * 1000, len(batch)))
            else:
                _settle(queued_image, ArithmeticError("the network's scores are NaN or infinite"))


def _settle(queued_image: QueuedImage, outcome: Prediction | Exception) -> None:
    queued_image.outcome = outcome
    _wake(queued_image)


def _wake(queued_image: QueuedImage) -> None:
    if queued_image.wake is not None:
        queued_image.wake.set()


def _expired(queued_image: QueuedImage) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the forward pass did not start within {queued_image.deadline - queued_image.queued:.3g} s"
    )
