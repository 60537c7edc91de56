"""Builds requests and interprets answers. No input or output happens here."""

import json
import os
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

import httpx

from convoy_client.errors import (
    ConvoyError,
    Forbidden,
    InvalidAnswer,
    InvalidImage,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServerError,
    ServiceUnreachable,
    Timeout,
    Unauthorized,
    Unavailable,
)

VERSION = "0.1.0"
DEFAULT_URL = "http://127.0.0.1:8080"
VARIABLE = "CONVOY_TOKEN"
MAX_ANSWER_BYTES = 16 * 1024 * 1024
OVERLOADED = "urn:convoy:problem:overloaded"
# docs/api.md, "Errors". Other statuses are InvalidRequest (4xx) and ServerError (5xx).
ERRORS: dict[int, type[ConvoyError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    413: InvalidImage,
    415: InvalidImage,
    422: InvalidImage,
    429: Overloaded,
    502: Unavailable,
    503: Unavailable,
    504: Timeout,
}


@dataclass(frozen=True, slots=True)
class Call:
    """A request."""

    method: str
    url: str
    headers: dict[str, str] = field(repr=False)  # one is the token
    body: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer."""

    status: int
    headers: httpx.Headers
    body: bytes


class Endpoint:
    """Builds the requests to one service. Immutable."""

    def __init__(self, url: str, token: str | None) -> None:
        """Address the service at ``url``, which may have a path of a proxy.

        Args:
            url: ``http://HOST:PORT`` or ``https://HOST/PATH``.
            token: sent with each request; None takes ``CONVOY_TOKEN`` if that is set.

        Raises:
            ValueError: the URL or the token cannot be used.
        """
        address = _checked_address(url)
        host = address.netloc.rpartition("@")[2]
        # A proxy may serve the service below its own path.
        self._base = f"{address.scheme}://{host}{quote(address.path.rstrip('/'), safe='/%')}"
        self.is_local = address.hostname in ("127.0.0.1", "::1", "localhost")
        self._headers = {"User-Agent": f"convoy-client/{VERSION}", "Accept-Encoding": "identity"}
        token = os.environ.get(VARIABLE) if token is None else token
        if token:
            self._headers["Authorization"] = f"Bearer {_checked_header('the token', token)}"

    def classify(self, path: str, body: bytes, top_k: int, session: str | None) -> Call:
        """The request that classifies the encoded picture ``body``. ``path``: see ``model_path``.

        Raises:
            ValueError: ``session`` has characters that a header cannot have.
        """
        headers = {**self._headers, "Content-Type": "application/octet-stream"}
        if session is not None:
            headers["X-Session-Id"] = _checked_header("the session", session)
        return Call("POST", f"{self._base}{path}/classify?top_k={top_k:d}", headers, body)

    def get(self, path: str) -> Call:
        """The request that reads ``path``."""
        return Call("GET", self._base + path, self._headers)


def model_path(model: str | None, version: int | None, alias: str | None) -> str:
    """The path of a model, of one version or of an alias; ``/v1`` stands for the default model.

    Raises:
        ValueError: the arguments contradict each other, or a path cannot have one of the names.
    """
    if model is None:
        if version is not None or alias is not None:
            raise ValueError("name the model whose version or alias you want: model=…")
        return "/v1"
    if version is not None and alias is not None:
        raise ValueError(f"pass version={version} or alias={alias!r}, not both")
    path = f"/v1/models/{_segment(model)}"
    if version is not None:
        return f"{path}/versions/{version:d}"
    return path if alias is None else f"{path}/aliases/{_segment(alias)}"


def metadata_path(model: str, version: int | None) -> str:
    """The path of the metadata of one version, or of the champion.

    Raises:
        ValueError: a path cannot have that name.
    """
    path = f"/v2/models/{_segment(model)}"
    return path if version is None else f"{path}/versions/{version:d}"


def _segment(name: str) -> str:
    # httpx removes the segments "." and ".." from a path (RFC 3986, section 5.2.4), and then the
    # request would go to another model.
    if name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not the name of a model or alias")
    return quote(name, safe="")


def failure_of(reply: Reply, url: str) -> ConvoyError | None:
    """The error that ``reply`` reports; None if its status is 200."""
    if reply.status == 200:
        return None
    if reply.status < 400:
        place = reply.headers.get("location", "another place")
        return InvalidAnswer(f"{url} redirects to {place}; use that URL", status=reply.status)
    problem = _problem(reply.body)
    kind = ERRORS.get(reply.status) or (InvalidRequest if reply.status < 500 else ServerError)
    if kind is Unavailable and problem.get("type") == OVERLOADED:
        kind = Overloaded
    detail = problem.get("detail") or f"{url} answered with status {reply.status}"
    request_id = reply.headers.get("x-request-id") or problem.get("request_id")
    return kind(
        str(detail), status=reply.status, request_id=str(request_id) if request_id else None
    )


def failure_of_transport(error: httpx.RequestError, url: str) -> ConvoyError:
    """The error of this package for an error of httpx."""
    text = str(error) or type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        return Timeout(f"no answer from {url} in time ({type(error).__name__})")
    # httpx tells only by its text that the peer closed the connection. Other protocol errors are
    # not transient.
    closed = "disconnected" in text or "closed connection" in text
    if isinstance(error, httpx.TransportError) and (
        closed or not isinstance(error, httpx.ProtocolError)
    ):
        return ServiceUnreachable(f"no answer from {url}: {text}")
    return InvalidAnswer(f"{url} does not speak HTTP: {text}")


def checked_concurrency(concurrency: int) -> int:
    """``concurrency`` unchanged; ``ValueError`` if it is below 1."""
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}; it must be 1 or more")
    return concurrency


def connection_limits(concurrency: int) -> httpx.Limits:
    """Connections that stay open between requests; a caller's threads may open more."""
    return httpx.Limits(max_connections=None, max_keepalive_connections=max(concurrency, 20))


def _problem(body: bytes) -> dict[str, Any]:
    """The members of problem JSON; empty if the body is not JSON, as a proxy's may be."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _checked_address(url: str) -> SplitResult:
    try:
        address = urlsplit(url)
        address.port  # noqa: B018 - it raises if the port is not a number
    except ValueError as error:
        raise ValueError(f"{url!r} is not an address ({error}); write http://HOST:PORT") from error
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(f"{url!r} is not an address; write http://HOST:PORT")
    if address.query or address.fragment or "@" in address.netloc:
        raise ValueError(
            f"the address of {address.hostname!r} has a user, a query or a fragment; "
            "write http://HOST:PORT or https://HOST/PATH"
        )
    return address


def _checked_header(what: str, text: str) -> str:
    if not (text.isascii() and text.isprintable()) or text != text.strip() or not text:
        raise ValueError(f"{what} must be printable ASCII without spaces around it")
    return text
