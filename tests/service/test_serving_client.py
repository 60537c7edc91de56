"""The registry reads a service's traffic over HTTP, with the service key if that needs one."""

import socket

import pytest

from registry.canary.serving_client import _replicas, read_serving_status, service_addresses
from registry.core.errors import ModelNotReady, UsageError
from registry.core.service_address import SERVICE_KEY


def test_the_status_of_a_service_is_read_over_http(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SERVICE_KEY, "a service key")
    status = read_serving_status([url], "digits")
    assert status.champion == 1
    with pytest.raises(ModelNotReady, match="did not report"):
        read_serving_status([url], "other")


@pytest.mark.parametrize(
    "text", [",", "ftp://x", "http://", "http://x:port", "http://x:99999", "http://x:0", "x:8080"]
)
def test_what_is_no_address_is_said_at_once(text: str) -> None:
    with pytest.raises(UsageError, match="is not an http"):
        service_addresses({"CONVOY_SERVICE_URL": text})


def found(*hosts: str) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    return [
        (socket.AF_INET6 if ":" in host else socket.AF_INET, 1, 6, "", (host, 8080))
        for host in hosts
    ]


@pytest.mark.parametrize(
    ("hosts", "asked"),
    [
        (["10.0.0.2", "10.0.0.1"], ["http://10.0.0.1:8080", "http://10.0.0.2:8080"]),
        (["2001:db8::5", "10.0.0.1"], ["http://10.0.0.1:8080"]),  # one machine, two families
        (["2001:db8::5"], ["http://[2001:db8::5]:8080"]),
    ],
)
def test_every_machine_of_a_name_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, hosts: list[str], asked: list[str]
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found(*hosts))
    assert _replicas("http://service:8080") == asked


def test_a_name_that_nobody_has_is_said() -> None:
    with pytest.raises(ModelNotReady, match="cannot be resolved"):
        read_serving_status(["http://no-such-name.invalid:1"], "digits")
