"""The messages of gRPC calls: slow ones, and more than the memory for them."""

import threading
from collections.abc import Iterator

import pytest

from registry.core.errors import InvalidTensor, Overloaded
from service.protocols.grpc_v2 import receiving
from service.protocols.grpc_v2.call_threads import CallThreads
from service.protocols.grpc_v2.receiving import Receiver
from tests.conftest import WAIT_TIMEOUT_S, wait_for

MIB, GIB = 2**20, 2**30


class SlowClient:
    """Sends its message when the test says so, unless the call is cancelled before."""

    def __init__(self) -> None:
        self.send = threading.Event()
        self.is_cancelled = False

    def messages(self) -> Iterator[bytes]:
        assert self.send.wait(WAIT_TIMEOUT_S)
        if not self.is_cancelled:
            yield b"message"

    def cancel(self) -> None:
        self.is_cancelled = True
        self.send.set()


def receive(receiver: Receiver, client: SlowClient) -> None:
    with receiver.message(client.messages(), client.cancel) as message:
        assert message == b"message"


def test_more_slow_calls_than_there_are_threads_leave_a_thread_for_others() -> None:
    threads = CallThreads(2)
    receiver = Receiver(threads, max_slow=10, max_bytes=MIB, max_growth_bytes=GIB)
    clients = [SlowClient() for _ in range(5)]
    calls = [threads.submit(receive, receiver, each) for each in clients]
    assert threads.submit(lambda: "answered").result(WAIT_TIMEOUT_S) == "answered"
    for each in clients:
        each.send.set()
    for call in calls:
        call.result(WAIT_TIMEOUT_S)


def test_of_too_many_slow_calls_those_that_waited_longest_are_cancelled() -> None:
    threads = CallThreads(1)
    receiver = Receiver(threads, max_slow=2, max_bytes=MIB, max_growth_bytes=GIB)
    clients = [SlowClient() for _ in range(4)]
    calls = [threads.submit(receive, receiver, each) for each in clients]
    for call in calls[:2]:
        with pytest.raises(Overloaded, match="too slowly"):
            call.result(WAIT_TIMEOUT_S)
    assert not any(each.is_cancelled for each in clients[2:])
    for each in clients[2:]:
        each.send.set()
    for call in calls[2:]:
        call.result(WAIT_TIMEOUT_S)


def test_a_slow_call_is_cancelled_if_the_process_grows_by_more_than_the_limit() -> None:
    threads = CallThreads(1)
    receiver = Receiver(threads, max_slow=10, max_bytes=MIB, max_growth_bytes=8 * MIB)
    client = SlowClient()
    threads.submit(receive, receiver, client)
    parts: list[bytes] = []

    def grow() -> bool:
        parts.append(b"\1" * (4 * MIB))
        return client.is_cancelled

    wait_for(grow)


def test_a_call_whose_message_has_arrived_is_never_cancelled() -> None:
    threads = CallThreads(1)
    receiver = Receiver(threads, max_slow=0, max_bytes=MIB, max_growth_bytes=GIB)
    cancelled, go_on = threading.Event(), threading.Event()

    def answer() -> None:
        with receiver.message(iter([b"message"]), cancelled.set):
            go_on.wait(WAIT_TIMEOUT_S)

    call = threads.submit(answer)
    client = SlowClient()
    slow = threads.submit(receive, receiver, client)  # it is cancelled after the call before began
    with pytest.raises(Overloaded):
        slow.result(WAIT_TIMEOUT_S)
    go_on.set()
    call.result(WAIT_TIMEOUT_S)
    assert not cancelled.is_set()


def test_a_lack_of_file_descriptors_does_not_end_the_checks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(receiving, "PAUSE_S", 0.0)
    failures = iter([OSError("too many open files")])

    def rss_once_failing() -> int:
        for error in failures:
            raise error
        return 1

    monkeypatch.setattr(receiving, "rss_mb", rss_once_failing)
    threads = CallThreads(1)
    receiver = Receiver(threads, max_slow=10, max_bytes=MIB, max_growth_bytes=GIB)
    clients = [SlowClient() for _ in range(3)]
    calls = [threads.submit(receive, receiver, each) for each in clients]
    assert threads.submit(lambda: "answered").result(WAIT_TIMEOUT_S) == "answered"
    for each in clients:
        each.send.set()
    for call in calls:
        call.result(WAIT_TIMEOUT_S)


def test_messages_over_the_limit_together_are_refused_until_one_is_answered() -> None:
    receiver = Receiver(CallThreads(1), max_slow=10, max_bytes=10, max_growth_bytes=GIB)
    with receiver.message(iter([b"8 bytes!"]), lambda: None):
        with (
            pytest.raises(Overloaded, match="messages of 8 bytes"),
            receiver.message(iter([b"8 bytes!"]), lambda: None),
        ):
            pass
        with receiver.message(iter([b"2b"]), lambda: None) as message:
            assert message == b"2b"
    with receiver.message(iter([b"8 bytes!"]), lambda: None) as message:
        assert message == b"8 bytes!"


def test_a_call_without_a_message_is_refused() -> None:
    receiver = Receiver(CallThreads(1), max_slow=10, max_bytes=10, max_growth_bytes=GIB)
    with (
        pytest.raises(InvalidTensor, match="no message"),
        receiver.message(iter([]), lambda: None),
    ):
        pass
