"""A closing listener accepts clients that are connecting, and no new ones."""

import socket
import sys

import pytest

from service.server.sockets.graceful_close import reject_new_connections
from tests.conftest import WAIT_TIMEOUT_S


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's filters are Linux's")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_new_clients_cannot_connect_and_connected_clients_are_served(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with listener:
        address = listener.getsockname()[:2]
        with (
            socket.create_connection(address, timeout=WAIT_TIMEOUT_S) as accepted_before,
            socket.create_connection(address, timeout=WAIT_TIMEOUT_S) as accepted_after,
        ):
            first, _ = listener.accept()
            reject_new_connections(listener)
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.3)
            second, _ = listener.accept()  # this client had connected before
            with first, second:
                for client, served in ((accepted_before, first), (accepted_after, second)):
                    client.sendall(b"request")
                    assert served.recv(7) == b"request"
                    served.sendall(b"answer")
                    assert client.recv(6) == b"answer"
                listener.close()
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection(address, timeout=WAIT_TIMEOUT_S)
