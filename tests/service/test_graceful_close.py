"""Who has begun to connect finishes; nobody new begins."""

import socket
import sys

import pytest

from service.server.graceful_close import reject_new_connections
from tests.conftest import WAIT_TIMEOUT_S


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's filters are Linux's")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_nobody_new_connects_and_who_is_there_stays(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with listener:
        address = listener.getsockname()[:2]
        with (
            socket.create_connection(address, timeout=WAIT_TIMEOUT_S) as welcomed,
            socket.create_connection(address, timeout=WAIT_TIMEOUT_S) as waiting,
        ):
            served, _ = listener.accept()
            reject_new_connections(listener)
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.3)
            later, _ = listener.accept()  # it had connected before
            with served, later:
                for ours, theirs in ((welcomed, served), (waiting, later)):
                    ours.sendall(b"asked")
                    assert theirs.recv(5) == b"asked"
                    theirs.sendall(b"answered")
                    assert ours.recv(8) == b"answered"
                listener.close()
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection(address, timeout=WAIT_TIMEOUT_S)
