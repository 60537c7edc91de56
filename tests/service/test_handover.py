"""Connections that move to a less busy worker; all workers of a test run in its process."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.server.sockets.handover import NEVER, SILENT_S, Handover, forget_worker


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Handover]]:
    """Three workers that share a folder and have found each other."""
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
    """The two ends of a connection: the client's socket and the service's."""
    pair = socket.socketpair()
    yield pair
    for each in pair:
        each.close()


def test_the_least_loaded_worker_gets_the_connection_with_its_unread_bytes(
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
def test_a_connection_stays_if_every_other_worker_is_as_busy(
    workers: list[Handover], client: tuple[socket.socket, socket.socket], loads: tuple[int, ...]
) -> None:
    for worker, load in zip(workers, loads, strict=True):
        worker.load = load
    assert not workers[0].give(client[1])
    assert [worker.take() for worker in workers] == [[], [], []]


def test_a_killed_worker_gets_no_connection(
    workers: list[Handover], client: tuple[socket.socket, socket.socket]
) -> None:
    for worker, load in zip(workers, (5, 1, 0), strict=True):
        worker.load = load
    workers[2].sock.close()  # a killed process leaves its files too
    assert workers[0].give(client[1])
    (taken,) = workers[1].take()
    taken.close()


def test_a_worker_whose_loop_does_not_turn_gets_no_connection(
    workers: list[Handover], client: tuple[socket.socket, socket.socket]
) -> None:
    for worker, load in zip(workers, (5, 1, 0), strict=True):
        worker.load = load
    workers[2].beat(time.monotonic() - 2 * SILENT_S)
    assert workers[0].give(client[1])
    (taken,) = workers[1].take()
    taken.close()


def test_a_new_worker_may_reuse_a_dead_workers_process_id_and_files_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 101)
    Handover(tmp_path).sock.close()  # a killed process leaves its files too
    again = Handover(tmp_path)
    again.sock.close()
    forget_worker(tmp_path, 101)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_ended_gets_no_connection(
    workers: list[Handover], client: tuple[socket.socket, socket.socket]
) -> None:
    workers[0].load = 5
    for worker in workers[1:]:
        worker.load = NEVER
        worker.close()
    workers[0].find_peers()
    assert not workers[0].give(client[1])
