"""The batcher, its threads steered with events."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.core.errors import DeadlineExceeded, Overloaded
from service.inference.batcher import BatchLimits, Compute, MicroBatcher, Prediction

FOREVER_S = 30.0
ANY_TIME_MS = 1e9  # a closed gate makes passes slow, which must not lower the batch's ceiling


def image(value: int) -> np.ndarray:
    return np.full((2, 2, 1), value, dtype=np.uint8)


def echo(pixels: np.ndarray) -> np.ndarray:
    """Scores of one class: the picture's first value."""
    return pixels[:, 0, 0, :].astype(np.float32)


def values(outcomes: list[Prediction | Exception]) -> list[float]:
    return [float(each.row[0]) for each in outcomes if isinstance(each, Prediction)]


class Gate:
    """A compute function that holds the device until it is opened."""

    def __init__(self, compute: Callable[[np.ndarray], np.ndarray] = echo) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.batches: list[int] = []
        self._compute = compute

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        self.batches.append(len(pixels))
        self.entered.release()
        assert self.open.wait(FOREVER_S)
        return self._compute(pixels)


def batcher_of(
    compute: Compute, max_batch: int, queue_limit: int, **limits: float | None
) -> MicroBatcher:
    found = {"max_batch": max_batch, "queue_limit": queue_limit, **limits}
    return MicroBatcher(compute, msgspec.convert(found, BatchLimits))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + FOREVER_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as executor:
        yield executor


def score(
    batcher: MicroBatcher, *numbers: int, deadline_s: float = FOREVER_S
) -> list[Prediction | Exception]:
    """Queue images and wait for all of them, as a request does."""
    queued_images = batcher.put([image(number) for number in numbers], deadline_s)
    return [batcher.wait(queued_image) for queued_image in queued_images]


def submit(
    pool: ThreadPoolExecutor, batcher: MicroBatcher, *numbers: int, deadline_s: float = FOREVER_S
) -> "Future[list[Prediction | Exception]]":
    return pool.submit(score, batcher, *numbers, deadline_s=deadline_s)


def test_a_lone_request_runs_at_once_in_its_own_thread() -> None:
    threads = []

    def compute(pixels: np.ndarray) -> np.ndarray:
        threads.append(threading.current_thread())
        return echo(pixels)

    outcomes = score(batcher_of(compute, 8, 8), 7)
    assert values(outcomes) == [7]
    assert threads == [threading.current_thread()]


def test_requests_that_find_the_device_busy_share_the_next_batch(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    batcher = batcher_of(gate, 8, 64, max_batch_compute_ms=ANY_TIME_MS)
    first = submit(pool, batcher, 1)
    gate.entered.acquire()
    others = [submit(pool, batcher, number) for number in range(2, 8)]
    wait_until(lambda: batcher.depth == 6)
    gate.open.set()
    assert values(first.result()) == [1]
    assert [values(other.result()) for other in others] == [[n] for n in range(2, 8)]
    assert gate.batches == [1, 6]
    (outcome,) = others[0].result()
    assert isinstance(outcome, Prediction)
    assert outcome.batch_size == 6


def test_a_batch_is_never_larger_than_allowed(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    batcher = batcher_of(gate, 4, 64, max_batch_compute_ms=ANY_TIME_MS)
    first = submit(pool, batcher, 0)
    gate.entered.acquire()
    many = submit(pool, batcher, *range(1, 11))
    wait_until(lambda: batcher.depth == 10)
    gate.open.set()
    assert values(many.result()) == list(range(1, 11))
    first.result()
    assert gate.batches == [1, 4, 4, 2]


def test_a_full_queue_refuses_and_queues_none_of_the_request(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    batcher = batcher_of(gate, 4, 2, max_batch_compute_ms=ANY_TIME_MS)
    first = submit(pool, batcher, 1)
    gate.entered.acquire()
    waiting = submit(pool, batcher, 2)
    wait_until(lambda: batcher.depth == 1)
    with pytest.raises(Overloaded, match="1 images are already waiting"):
        batcher.put([image(3), image(4)], FOREVER_S)
    assert batcher.depth == 1
    gate.open.set()
    assert values(waiting.result()) == [2]
    first.result()


def test_an_expired_image_is_not_computed(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    batcher = batcher_of(gate, 4, 64, max_batch_compute_ms=ANY_TIME_MS)
    first = submit(pool, batcher, 1)
    gate.entered.acquire()
    (outcome,) = score(batcher, 2, deadline_s=0.01)
    assert isinstance(outcome, DeadlineExceeded)
    assert batcher.depth == 0
    gate.open.set()
    first.result()
    assert gate.batches == [1]


def test_an_image_that_expires_before_its_turn_is_left_out_of_the_batch(
    pool: ThreadPoolExecutor,
) -> None:
    """The first of two images waits without a limit; the second expires before their batch."""
    gate = Gate()
    batcher = batcher_of(gate, 4, 64, max_batch_compute_ms=ANY_TIME_MS)
    first = submit(pool, batcher, 1)
    gate.entered.acquire()
    patient = submit(pool, batcher, 2)
    wait_until(lambda: batcher.depth == 1)
    # The thread of 3 and 4 waits for 3 first, so no thread takes the expired 4 out of the queue.
    hasty = submit(pool, batcher, 3, 4)
    wait_until(lambda: batcher.depth == 3)
    with batcher._lock:
        batcher._waiting[2].deadline = time.monotonic()
    gate.open.set()
    assert values(patient.result()) == [2]
    outcomes = hasty.result()
    assert values(outcomes) == [3]
    assert isinstance(outcomes[1], DeadlineExceeded)
    first.result()
    assert gate.batches == [1, 2]


def test_an_image_whose_deadline_passes_during_its_forward_pass_gets_its_scores(
    pool: ThreadPoolExecutor,
) -> None:
    steps, entered = threading.Semaphore(0), threading.Semaphore(0)

    def compute(pixels: np.ndarray) -> np.ndarray:
        entered.release()
        assert steps.acquire(timeout=FOREVER_S)
        return echo(pixels)

    batcher = batcher_of(compute, 2, 64)
    first = submit(pool, batcher, 1)
    entered.acquire()
    leader = submit(pool, batcher, 2)
    wait_until(lambda: batcher.depth == 1)
    late = submit(pool, batcher, 3)
    wait_until(lambda: batcher.depth == 2)
    item = batcher._waiting[1]
    steps.release()
    entered.acquire()  # the batch of 2 and 3 runs now, led by the thread of 2
    giving_up = pool.submit(batcher._give_up, item)  # as the image's thread does at its deadline
    assert not giving_up.done()
    steps.release()
    giving_up.result(FOREVER_S)
    assert isinstance(item.outcome, Prediction)
    assert [values(each.result()) for each in (first, leader, late)] == [[1], [2], [3]]


def test_one_bad_image_fails_alone(pool: ThreadPoolExecutor) -> None:
    def compute(pixels: np.ndarray) -> np.ndarray:
        if (pixels == 3).any():
            raise ValueError("no threes")
        return echo(pixels)

    gate = Gate(compute)
    batcher = batcher_of(gate, 8, 64, max_batch_compute_ms=ANY_TIME_MS)
    first = submit(pool, batcher, 1)
    gate.entered.acquire()
    others = [submit(pool, batcher, number) for number in (2, 3, 4)]
    wait_until(lambda: batcher.depth == 3)
    gate.open.set()
    results = [other.result() for other in others]
    assert [values(result) for result in results] == [[2], [], [4]]
    assert isinstance(results[1][0], ValueError)
    first.result()


def test_nan_is_an_error_of_its_image_alone() -> None:
    def compute(pixels: np.ndarray) -> np.ndarray:
        return np.where(pixels[:, 0, 0] == 2, np.nan, 1.0).astype(np.float32)

    outcomes = score(batcher_of(compute, 8, 8), 1, 2, 3)
    assert [isinstance(each, Prediction) for each in outcomes] == [True, False, True]
    assert isinstance(outcomes[1], ArithmeticError)


def test_too_few_rows_are_an_error() -> None:
    outcomes = score(batcher_of(lambda pixels: echo(pixels)[:0], 8, 8), 1)
    assert "returned 0 rows of scores for 1 images" in str(outcomes[0])


def test_after_an_error_the_device_is_free_again() -> None:
    failing = [True]

    def compute(pixels: np.ndarray) -> np.ndarray:
        if failing.pop() if failing else False:
            raise MemoryError("once")
        return echo(pixels)

    batcher = batcher_of(compute, 8, 8)
    assert isinstance(score(batcher, 1)[0], MemoryError)
    assert values(score(batcher, 2)) == [2]


def test_a_hand_over_wakes_a_thread_that_waits_for_an_earlier_image(
    pool: ThreadPoolExecutor,
) -> None:
    """With batches of one, every image of a request is led by its own thread, in order."""
    batcher = batcher_of(echo, 1, 1000)
    futures = [submit(pool, batcher, *range(n, n + 5)) for n in range(0, 100, 5)]
    assert [values(future.result(FOREVER_S)) for future in futures] == [
        list(range(n, n + 5)) for n in range(0, 100, 5)
    ]


@pytest.mark.parametrize(
    ("image_ms", "max_queue_delay_s", "callers"),
    [
        (5, None, 200),  # a second of work is always queued
        (45, None, 64),
        (125, None, 64),
        (200, None, 40),  # 64 would not be answered within eight of the ten seconds
        (45, 0.9, 20),  # an operator may lower the limit
    ],
)
def test_ordinary_concurrency_is_queued_whatever_the_speed_of_the_network(
    monkeypatch: pytest.MonkeyPatch, image_ms: int, max_queue_delay_s: float | None, callers: int
) -> None:
    now = [0.0]
    monkeypatch.setattr("service.inference.batcher.time", SimpleNamespace(monotonic=lambda: now[0]))

    def compute(pixels: np.ndarray) -> np.ndarray:
        now[0] += image_ms / 1000 * len(pixels)
        return echo(pixels)

    batcher = batcher_of(compute, 8, 1000, max_queue_delay_s=max_queue_delay_s, deadline_s=10)
    score(batcher, 1)
    batcher.check_room(callers)
    with pytest.raises(Overloaded) as refused:
        batcher.check_room(callers + 1)
    assert refused.value.retry_after_s == math.ceil((callers + 1) * image_ms / 1000)


@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(st.integers(1, 6), min_size=1, max_size=24),
    max_batch=st.integers(1, 8),
    deadline_ms=st.sampled_from([0.0, 0.3, 1.0, 30_000.0]),
)
def test_every_image_gets_exactly_one_outcome_of_its_own(
    requests: list[int], max_batch: int, deadline_ms: float
) -> None:
    def compute(pixels: np.ndarray) -> np.ndarray:
        time.sleep(0.0002)
        return echo(pixels)

    batcher = batcher_of(compute, max_batch, 10_000)
    with ThreadPoolExecutor(len(requests)) as executor:
        futures = {
            number: submit(executor, batcher, *([number] * size), deadline_s=deadline_ms / 1000)
            for number, size in enumerate(requests)
        }
        for number, future in futures.items():
            outcomes = future.result(FOREVER_S)
            assert len(outcomes) == requests[number]
            for outcome in outcomes:
                if isinstance(outcome, Prediction):
                    assert outcome.row[0] == number
                else:
                    assert isinstance(outcome, DeadlineExceeded)
    assert batcher.depth == 0
    assert values(score(batcher, 9)) == [9]
