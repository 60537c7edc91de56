"""Asks services over HTTP how they serve a model."""

import http.client
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence

import msgspec

from registry.canary.traffic_stats import ServingStatus, add_up
from registry.core.errors import ModelNotReady, UsageError
from registry.core.service_address import DEFAULT_PORT, SERVICE_KEY

TIMEOUT_S = 2.0
MAX_BYTES = 4_000_000


def service_addresses(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The addresses in ``CONVOY_SERVICE_URL``, separated by commas; by default this machine's.

    If an http address has a host name, every machine of that name counts as a replica.

    Raises:
        UsageError: an address is not an http or https address, or the setting names no address.
    """
    port = environment.get("CONVOY_PORT") or DEFAULT_PORT
    text = environment.get("CONVOY_SERVICE_URL") or f"http://127.0.0.1:{port}"
    found = tuple(part.strip().rstrip("/") for part in text.split(",") if part.strip())
    for address in found or [text]:
        try:
            parts = urllib.parse.urlsplit(address)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # the port is not a number
            good = False
        if not good:
            raise UsageError(
                f"CONVOY_SERVICE_URL={text!r}: {address!r} is not an http or https address"
            )
    return found


def read_serving_status(services: Sequence[str], model: str) -> ServingStatus:
    """How all ``services``, given by their addresses, serve ``model``, added up.

    Raises:
        ModelNotReady: a service cannot be reached, or does not serve the model.
    """
    return add_up(
        [_ask(each, service, model) for service in services for each in _replicas(service)]
    )


def _replicas(service: str) -> list[str]:
    """The addresses of all replicas of ``service``.

    An https address is not resolved, because its certificate is for the name. A machine may have an
    IPv4 and an IPv6 address, so only one family counts.
    """
    parts = urllib.parse.urlsplit(service)
    if parts.scheme == "https":
        return [service]
    port = parts.port or 80
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ModelNotReady(f"the host of {service} cannot be resolved: {error}") from error
    first = min(family for family, *_ in found)  # IPv4, if there is any
    hosts = sorted({str(address[0]) for family, *_, address in found if family == first})
    return [f"http://{f'[{host}]' if ':' in host else host}:{port}{parts.path}" for host in hosts]


def _ask(replica: str, service: str, model: str) -> ServingStatus:
    url = f"{replica}/v1/models/{urllib.parse.quote(model)}/traffic"
    key = os.environ.get(SERVICE_KEY)
    headers = {"Host": urllib.parse.urlsplit(service).netloc.rpartition("@")[2]}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - checked
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            return msgspec.json.decode(answer.read(MAX_BYTES), type=ServingStatus)
    except (OSError, ValueError, http.client.HTTPException, msgspec.MsgspecError) as error:
        raise ModelNotReady(f"{service} did not report how it serves {model}: {error}") from error
