"""When a worker ends itself."""

import signal
import time
from itertools import pairwise
from threading import Event
from types import SimpleNamespace

import pytest

from registry.model.refs import ModelRef
from service.loading import watchdog
from service.loading.watchdog import Watchdog, rss_mb
from tests.conftest import WAIT_TIMEOUT_S


class Ends:
    def __init__(self) -> None:
        self.signals: list[signal.Signals] = []

    def __call__(self, number: signal.Signals) -> None:
        self.signals.append(number)


class Clock:
    """Stands for ``time.monotonic``."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def look_for(self, dog: Watchdog, seconds: float) -> None:
        """Have ``dog`` look as its thread does."""
        for _ in range(round(seconds / watchdog.POLL_INTERVAL_S)):
            self.now_s += watchdog.POLL_INTERVAL_S
            dog.poll_once()

    def advance(self, seconds: float, looked_after: SimpleNamespace) -> None:
        self.now_s += seconds
        looked_after.running_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now_s)
    return clock


def slot(running_s: float) -> SimpleNamespace:
    return SimpleNamespace(ref=ModelRef("digits", 1), running_s=running_s)


def test_a_forward_pass_that_hangs_is_said_and_then_ends_the_worker(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = Ends()
    looked_after = slot(0.0), slot(29.0)
    dog = Watchdog(looked_after, 30.0, end=end)
    clock.look_for(dog, 60.0)
    assert (dog.reason, end.signals) == (None, [])
    looked_after[1].running_s = 31.0
    said: list[str | None] = []

    def sleep(seconds: float) -> None:
        said.append(dog.reason)
        clock.now_s += seconds
        looked_after[1].running_s += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    dog.poll_once()
    assert end.signals == [signal.SIGKILL]
    assert said == ["digits: a forward pass has not ended for 31 s"]  # before it ended


@pytest.mark.parametrize("afterwards_s", [0.0, 1.0])
def test_a_worker_whose_pass_ends_in_the_last_moment_goes_on(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, afterwards_s: float
) -> None:
    end, looked_after = Ends(), slot(0.0)
    dog = Watchdog((looked_after,), 30.0, end=end)
    clock.look_for(dog, 60.0)
    looked_after.running_s = 31.0

    def sleep(seconds: float) -> None:
        clock.now_s += seconds
        looked_after.running_s = afterwards_s  # nothing runs, or another pass

    monkeypatch.setattr(time, "sleep", sleep)
    dog.poll_once()
    assert (dog.reason, end.signals) == (None, [])


def test_the_time_in_which_the_process_was_stopped_is_not_the_pass_s(clock: Clock) -> None:
    """As by `docker pause`, SIGSTOP or a machine that slept, in the middle of a forward pass."""
    end, looked_after = Ends(), slot(0.0)
    dog = Watchdog((looked_after,), 30.0, end=end)
    clock.look_for(dog, 60.0)
    clock.now_s += 3600.0
    looked_after.running_s = 3600.0
    clock.look_for(dog, 29.0)
    assert (dog.reason, end.signals) == (None, [])
    looked_after.running_s = 3632.0
    clock.now_s += 2.0  # it hangs all the same
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: clock.advance(seconds, looked_after))
        dog.poll_once()
    assert end.signals == [signal.SIGKILL]


def test_a_worker_that_grows_ends_gently_and_not_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end = Ends()
    monkeypatch.setattr(watchdog, "JITTER_S", 0.2)
    dog = Watchdog((), 30.0, max_rss_mb=1, end=end)
    began = time.monotonic()
    while not end.signals:
        dog.poll_once()
        assert time.monotonic() - began < WAIT_TIMEOUT_S
    dog.poll_once()
    assert end.signals == [signal.SIGTERM]
    assert dog.reason is None  # it answers on until it has drained


def test_without_a_limit_no_memory_is_too_much() -> None:
    end = Ends()
    Watchdog((), 30.0, end=end).poll_once()
    assert not end.signals
    assert rss_mb() > 20


def test_a_look_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    end, perceptual_hashes = Ends(), iter([OSError("no descriptor is free"), 0.0])
    looked = Event()

    class Slot:
        @property
        def running_s(self) -> float:
            found = next(perceptual_hashes, None)
            if isinstance(found, OSError):
                raise found
            looked.set()
            return 0.0

    monkeypatch.setattr(watchdog, "POLL_INTERVAL_S", 0.01)
    Watchdog((Slot(),), 30.0, end=end).start()
    assert looked.wait(WAIT_TIMEOUT_S)


def test_who_has_shrunk_again_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    end, sizes = Ends(), iter([200, 200, 50, 50])
    monkeypatch.setattr(watchdog, "rss_mb", lambda: next(sizes))
    monkeypatch.setattr(watchdog, "JITTER_S", 1e-9)
    dog = Watchdog((), 30.0, max_rss_mb=100, end=end)
    dog.poll_once()
    assert len(end.signals) <= 1
    dog.poll_once()
    assert dog._restart_at is None


def test_what_is_kept_is_given_back_though_nothing_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was in use at one time may not be at the next."""
    given: list[float] = []
    monkeypatch.setattr(watchdog, "trim_heap", lambda: given.append(time.monotonic()))
    monkeypatch.setattr(watchdog, "rss_mb", lambda: 100)
    monkeypatch.setattr(watchdog, "TRIM_S", 0.05)
    dog = Watchdog((), 30.0, end=Ends())
    while len(given) < 3:
        dog.poll_once()
    assert all(later - sooner > 0.04 for sooner, later in pairwise(given))
