"""Parses a request's head with gunicorn's parser, and caches the result.

A client usually sends the same head again and again; only the Content-Length differs. For a small
image, the cache saves a quarter of the work (docs/decisions/0007).
"""

from typing import Any

from gunicorn import http
from gunicorn.http import errors, wsgi

from service.server.sockets.connection import Connection
from service.server.sockets.request_reader import (
    HEADERS_END,
    MAX_CACHED_HEAD_BYTES,
    RawRequest,
)

MAX_CACHED_HEADS = 1024


class HeaderCache:
    """Parses heads with gunicorn 26's parser and its configuration ``cfg``."""

    def __init__(self, cfg: Any) -> None:
        self._cfg = cfg
        self._known: dict[Any, tuple[Any, dict[str, Any]]] = {}

    def read(self, raw: RawRequest, connection: Connection) -> tuple[Any, dict[str, Any]]:
        """The request that gunicorn parsed, and a new WSGI environment without the body.

        Raises:
            Exception: the head is malformed. gunicorn's parser raises many types.
        """
        client, port = connection.client[:2] if connection.client else ("", "")  # "": a Unix socket
        key = raw.likeness, client, connection.server
        known = self._known.get(key) if raw.complete else None
        if known is None:
            known = self._parse(raw, connection)
            if raw.complete and len(raw.head) <= MAX_CACHED_HEAD_BYTES:
                if len(self._known) == MAX_CACHED_HEADS:
                    self._known.clear()
                self._known[key] = known
        request, environ = known
        own = {"REMOTE_PORT": str(port)}
        if raw.digits:
            own["CONTENT_LENGTH"] = raw.digits
        return request, environ | own

    def _parse(self, raw: RawRequest, connection: Connection) -> tuple[Any, dict[str, Any]]:
        request = next(http.get_parser(self._cfg, [raw.head, HEADERS_END], connection.client))
        _check(request)
        _read_connection(request)
        _, environ = wsgi.create(request, None, connection.client, connection.server, self._cfg)
        environ["wsgi.multithread"] = True
        for key in ("gunicorn.socket", "wsgi.early_hints", "wsgi.input"):
            environ.pop(key)  # these belong to one connection, and the cache serves all
        request.body = request.unreader = None
        return request, environ


def _check(request: Any) -> None:
    """Refuse heads that gunicorn accepts but that a proxy could interpret differently."""
    if request.version not in ((1, 0), (1, 1)):
        raise errors.InvalidHTTPVersion(request.version)
    hosts = sum(name == "HOST" for name, _ in request.headers)
    if hosts > 1 or (hosts == 0 and request.version == (1, 1)):
        raise ValueError(f"the request has {hosts} Host headers; send exactly one")


def _read_connection(request: Any) -> None:
    """Honour every option in a Connection header; gunicorn reads only a header with one option."""
    lists = [value for name, value in request.headers if name == "CONNECTION"]
    options = {option.strip().lower() for value in lists for option in value.split(",")}
    if "close" in options:
        request.force_close()
    elif "keep-alive" in options:
        request.headers = [each for each in request.headers if each[0] != "CONNECTION"]
        request.headers.append(("CONNECTION", "keep-alive"))
