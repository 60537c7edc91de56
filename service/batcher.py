"""``MicroBatcher``: concurrent callers share one forward pass. Knows no HTTP and no torch.

There is no timer and no thread of its own. Whoever finds the device idle runs what is waiting,
itself included; who finds it busy waits and is in the next batch, which the first of the waiting
runs. So a lone request waits for nothing, and load fills the batches.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import Event, Lock

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from registry.errors import DeadlineExceeded, Overloaded
from registry.preprocess import Pixels

Compute = Callable[[Pixels], NDArray[np.float32]]
"""uint8 (N, H, W, C) to float32 (N, classes)."""


class Scored(Struct, frozen=True):
    """The answer for one image: probabilities float32 (classes,), and how it got them."""

    probabilities: NDArray[np.float32]
    queue_ms: float
    forward_ms: float
    batch_size: int


class _Item:
    """One waiting image. ``leads`` and ``outcome`` are written before ``wake`` is set."""

    __slots__ = ("deadline", "leads", "outcome", "pixels", "queued", "wake")

    def __init__(self, pixels: Pixels, queued: float, deadline: float) -> None:
        self.pixels = pixels
        self.queued = queued
        self.deadline = deadline
        self.leads = False
        self.outcome: Scored | Exception | None = None
        self.wake = Event()


class MicroBatcher:
    """Batches calls of ``compute``; every public method may be called from any thread."""

    def __init__(self, compute: Compute, max_batch: int, queue_limit: int) -> None:
        self._compute = compute
        self._max_batch = max_batch
        self._queue_limit = queue_limit
        self._lock = Lock()
        self._waiting: deque[_Item] = deque()
        self._busy = False

    @property
    def depth(self) -> int:
        """Images that wait now."""
        return len(self._waiting)

    def submit(self, images: Sequence[Pixels], deadline_s: float) -> list[Scored | Exception]:
        """Scores for each image, in order; an image that failed has its exception instead.

        Blocks until all have an outcome. An image whose time is over before its batch starts is
        not computed and has ``DeadlineExceeded``.

        Args:
            images: uint8 (H, W, C) each, at least one.
            deadline_s: from now; a forward pass that runs already is not cut short.

        Raises:
            Overloaded: the queue has no room for all of them; none was queued.
        """
        now = time.monotonic()
        items = [_Item(pixels, now, now + deadline_s) for pixels in images]
        with self._lock:
            # A request larger than the whole queue may still run alone.
            if self._waiting and len(self._waiting) + len(items) > self._queue_limit:
                raise Overloaded(f"{len(self._waiting)} images wait already")
            self._waiting.extend(items)
            if not self._busy:
                self._busy = True
                items[0].leads = True
        return [self._outcome(item) for item in items]

    def _outcome(self, item: _Item) -> Scored | Exception:
        while item.outcome is None:
            if item.leads:
                item.leads = False
                self._run_batch()
            elif not item.wake.wait(max(0.0, item.deadline - time.monotonic())):
                self._give_up(item)
            else:
                item.wake.clear()
        return item.outcome

    def _give_up(self, item: _Item) -> None:
        """Take an expired item out of the queue, unless it is computed now or was told to lead."""
        with self._lock:
            if item.leads or item.outcome is not None:
                return
            if item in self._waiting:
                self._waiting.remove(item)
                item.outcome = _expired(item)
                return
        item.wake.wait()  # its batch runs now: the answer is on the way

    def _run_batch(self) -> None:
        """Compute one batch, then hand the device to the first of those still waiting."""
        batch: list[_Item] = []
        try:
            with self._lock:
                now = time.monotonic()
                while self._waiting and len(batch) < self._max_batch:
                    item = self._waiting.popleft()
                    if item.deadline > now:
                        batch.append(item)
                    else:
                        item.outcome = _expired(item)
                        item.wake.set()
            if batch:
                self._score(batch)
        finally:
            with self._lock:
                if self._waiting:
                    successor = self._waiting[0]
                    successor.leads = True
                    successor.wake.set()
                else:
                    self._busy = False

    def _score(self, batch: list[_Item]) -> None:
        """Give every item of ``batch`` its outcome; when the batch fails, each is tried alone."""
        started = time.monotonic()
        try:
            scores = self._compute(np.stack([item.pixels for item in batch]))
            if len(scores) != len(batch):
                raise RuntimeError(f"{len(batch)} images gave {len(scores)} rows of scores")
        except Exception as error:  # noqa: BLE001 - the edge of a batch: no error may reach others
            if len(batch) > 1:
                for item in batch:
                    self._score([item])
            else:
                batch[0].outcome = error
                batch[0].wake.set()
            return
        forward_ms = (time.monotonic() - started) * 1000
        for item, row in zip(batch, scores, strict=True):
            if np.isfinite(row).all():
                queue_ms = (started - item.queued) * 1000
                item.outcome = Scored(row, queue_ms, forward_ms, len(batch))
            else:
                item.outcome = ArithmeticError("the network scored NaN or infinity")
            item.wake.set()


def _expired(item: _Item) -> DeadlineExceeded:
    return DeadlineExceeded(f"not started within {item.deadline - item.queued:.3g} s")
