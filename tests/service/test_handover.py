"""Connections that move to a less busy worker, between two processes' worth of workers."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.server.handover import NEVER, SILENT_S, Handover, forget_worker


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Handover]]:
    """Three workers of one folder, which know each other."""
    made = []
    for pid in (101, 102, 103):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        made.append(Handover(tmp_path))
    for each in made:
        each.load = 0
        each.beat(time.monotonic() + 3600)
        each.find_peers()
    yield made
    for each in made:
        each.close()


@pytest.fixture
def client() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's socket and the service's."""
    pair = socket.socketpair()
    yield pair
    for each in pair:
        each.close()


def test_the_least_busy_worker_gets_a_connection_with_what_it_was_sent(
    workers: list[Handover], client: tuple[socket.socket, socket.socket]
) -> None:
    for worker, load in zip(workers, (3, 2, 1), strict=True):
        worker.load = load
    client[0].sendall(b"request")
    assert workers[0].give(client[1])
    assert workers[1].take() == []
    (taken,) = workers[2].take()
    assert taken.recv(100) == b"request"
    taken.sendall(b"answer")
    assert client[0].recv(100) == b"answer"
    taken.close()


@pytest.mark.parametrize("loads", [(1, 1, 1), (0, 1, 2), (2, 2, NEVER)])
def test_a_connection_stays_where_no_other_worker_has_less_to_do(
    workers: list[Handover], client: tuple[socket.socket, socket.socket], loads: tuple[int, ...]
) -> None:
    for worker, load in zip(workers, loads, strict=True):
        worker.load = load
    assert not workers[0].give(client[1])
    assert [worker.take() for worker in workers] == [[], [], []]


def test_a_worker_that_was_killed_gets_nothing(
    workers: list[Handover], client: tuple[socket.socket, socket.socket]
) -> None:
    for worker, load in zip(workers, (5, 1, 0), strict=True):
        worker.load = load
    workers[2].sock.close()  # its files stay, as a killed process leaves them
    assert workers[0].give(client[1])
    (taken,) = workers[1].take()
    taken.close()


def test_a_worker_whose_loop_does_not_turn_gets_nothing(
    workers: list[Handover], client: tuple[socket.socket, socket.socket]
) -> None:
    for worker, load in zip(workers, (5, 1, 0), strict=True):
        worker.load = load
    workers[2].beat(time.monotonic() - 2 * SILENT_S)
    assert workers[0].give(client[1])
    (taken,) = workers[1].take()
    taken.close()


def test_a_dead_workers_files_are_removed_and_its_number_may_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 101)
    Handover(tmp_path).sock.close()  # its files stay, as a killed process leaves them
    again = Handover(tmp_path)
    again.sock.close()
    forget_worker(tmp_path, 101)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_left_is_forgotten(
    workers: list[Handover], client: tuple[socket.socket, socket.socket]
) -> None:
    workers[0].load = 5
    for worker in workers[1:]:
        worker.load = NEVER
        worker.close()
    workers[0].find_peers()
    assert not workers[0].give(client[1])
