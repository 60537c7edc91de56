"""When the watchdog ends its worker."""

import signal
import time
from itertools import pairwise
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from registry.model.refs import ModelRef
from service.loading import watchdog
from service.loading.watchdog import Watchdog
from service.memory import rss_mb
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

    def poll_for(self, dog: Watchdog, seconds: float) -> None:
        """Have ``dog`` poll for ``seconds``, as its thread would."""
        for _ in range(round(seconds / watchdog.POLL_INTERVAL_S)):
            self.now_s += watchdog.POLL_INTERVAL_S
            dog.poll_once()

    def advance(self, seconds: float, hanging: SimpleNamespace) -> None:
        self.now_s += seconds
        hanging.running_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now_s)
    return clock


def slot(running_s: float) -> Any:
    """Stands for a ``ModelSlot``."""
    return SimpleNamespace(ref=ModelRef("digits", 1), running_s=running_s)


def test_a_forward_pass_that_hangs_is_reported_and_then_ends_the_worker(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = Ends()
    slots = slot(0.0), slot(29.0)
    dog = Watchdog(slots, 30.0, end=end)
    clock.poll_for(dog, 60.0)
    assert (dog.reason, end.signals) == (None, [])
    slots[1].running_s = 31.0
    reasons: list[str | None] = []

    def sleep(seconds: float) -> None:
        reasons.append(dog.reason)
        clock.now_s += seconds
        slots[1].running_s += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    dog.poll_once()
    assert end.signals == [signal.SIGKILL]
    assert reasons == ["digits: a forward pass has not ended for 31 s"]  # before the signal


@pytest.mark.parametrize("afterwards_s", [0.0, 1.0])
def test_a_worker_whose_pass_ends_at_the_last_moment_continues(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, afterwards_s: float
) -> None:
    end, hanging = Ends(), slot(0.0)
    dog = Watchdog((hanging,), 30.0, end=end)
    clock.poll_for(dog, 60.0)
    hanging.running_s = 31.0

    def sleep(seconds: float) -> None:
        clock.now_s += seconds
        hanging.running_s = afterwards_s  # no pass runs, or another one

    monkeypatch.setattr(time, "sleep", sleep)
    dog.poll_once()
    assert (dog.reason, end.signals) == (None, [])


def test_time_in_which_the_process_was_stopped_does_not_count_as_a_hang(clock: Clock) -> None:
    """`docker pause`, SIGSTOP or a sleeping machine may stop it in the middle of a forward pass."""
    end, hanging = Ends(), slot(0.0)
    dog = Watchdog((hanging,), 30.0, end=end)
    clock.poll_for(dog, 60.0)
    clock.now_s += 3600.0
    hanging.running_s = 3600.0
    clock.poll_for(dog, 29.0)
    assert (dog.reason, end.signals) == (None, [])
    hanging.running_s = 3632.0
    clock.now_s += 2.0  # now the pass has run for more than 30 s since the stop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: clock.advance(seconds, hanging))
        dog.poll_once()
    assert end.signals == [signal.SIGKILL]


def test_a_worker_with_too_much_memory_gets_sigterm_after_a_random_delay(
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
    assert dog.reason is None  # the worker stays ready until it drains


def test_without_a_limit_no_memory_is_too_much() -> None:
    end = Ends()
    Watchdog((), 30.0, end=end).poll_once()
    assert not end.signals
    assert rss_mb() > 20


def test_the_watchdog_continues_after_a_check_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    end, outcomes = Ends(), iter([OSError("no descriptor is free"), 0.0])
    checked = Event()

    class Slot:
        @property
        def running_s(self) -> float:
            found = next(outcomes, None)
            if isinstance(found, OSError):
                raise found
            checked.set()
            return 0.0

    monkeypatch.setattr(watchdog, "POLL_INTERVAL_S", 0.01)
    slots: Any = (Slot(),)
    Watchdog(slots, 30.0, end=end).start()
    assert checked.wait(WAIT_TIMEOUT_S)


def test_a_worker_that_has_shrunk_again_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    end, sizes = Ends(), iter([200, 200, 50, 50])
    monkeypatch.setattr(watchdog, "rss_mb", lambda: next(sizes))
    monkeypatch.setattr(watchdog, "JITTER_S", 1e-9)
    dog = Watchdog((), 30.0, max_rss_mb=100, end=end)
    dog.poll_once()
    assert len(end.signals) <= 1
    dog.poll_once()
    assert dog._restart_at is None


def test_the_heap_is_trimmed_at_intervals_without_any_growth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory that was in use at one time may be free at the next."""
    trimmed: list[float] = []
    monkeypatch.setattr(watchdog, "trim_heap", lambda: trimmed.append(time.monotonic()))
    monkeypatch.setattr(watchdog, "rss_mb", lambda: 100)
    monkeypatch.setattr(watchdog, "TRIM_S", 0.05)
    dog = Watchdog((), 30.0, end=Ends())
    while len(trimmed) < 3:
        dog.poll_once()
    assert all(later - sooner > 0.04 for sooner, later in pairwise(trimmed))
