"""The services asked how they serve a model, over HTTP."""

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
    """Those in ``CONVOY_SERVICE_URL``, with commas between them; by default this machine's.

    Of an http address with a name, every machine of that name is one: replicas.

    Raises:
        UsageError: one is no http or https address, or there is none.
    """
    port = environment.get("CONVOY_PORT") or DEFAULT_PORT
    text = environment.get("CONVOY_SERVICE_URL") or f"http://127.0.0.1:{port}"
    found = tuple(part.strip().rstrip("/") for part in text.split(",") if part.strip())
    for address in found or [text]:
        try:
            parts = urllib.parse.urlsplit(address)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number
            good = False
        if not good:
            raise UsageError(f"CONVOY_SERVICE_URL={text!r}: {address!r} is no http(s) address")
    return found


def read_serving_status(services: Sequence[str], model: str) -> ServingStatus:
    """What ``services``, by their addresses, say of ``model``, added up.

    Raises:
        ModelNotReady: one of them cannot be asked, or does not serve it.
    """
    return add_up(
        [_ask(each, service, model) for service in services for each in _replicas(service)]
    )


def _replicas(service: str) -> list[str]:
    """The addresses of all that have ``service``'s name; of https itself, for its certificate.

    A machine has one address of a family, and may have one of each: one family counts.
    """
    parts = urllib.parse.urlsplit(service)
    if parts.scheme == "https":
        return [service]
    port = parts.port or 80
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ModelNotReady(f"{service} cannot be found: {error}") from error
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
        raise ModelNotReady(f"{service} does not say how {model} is served: {error}") from error
