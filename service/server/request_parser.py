"""A request's head as gunicorn reads it, remembered.

A client sends the same head again and again, save the length of what it brings; what gunicorn made
of one is kept. That takes a quarter of the work off a small picture (docs/decisions/0007).
"""

from typing import Any

from gunicorn import http
from gunicorn.http import errors, wsgi

from service.server.connection import HEADERS_END, MAX_CACHED_HEAD_BYTES, Connection, RawRequest

MAX_CACHED_HEADS = 1024


class HeaderCache:
    """Reads heads by gunicorn 26's parser, under its configuration ``cfg``."""

    def __init__(self, cfg: Any) -> None:
        self._cfg = cfg
        self._known: dict[Any, tuple[Any, dict[str, Any]]] = {}

    def read(self, asked: RawRequest, connection: Connection) -> tuple[Any, dict[str, Any]]:
        """gunicorn's request, and a WSGI environment of its own without the body.

        Raises:
            Exception: of many kinds, gunicorn's parser's: the head cannot be understood.
        """
        client, port = connection.client[:2] if connection.client else ("", "")  # "": no TCP
        key = asked.likeness, client, connection.server
        known = self._known.get(key) if asked.complete else None
        if known is None:
            known = self._parse(asked, connection)
            if asked.complete and len(asked.head) <= MAX_CACHED_HEAD_BYTES:
                if len(self._known) == MAX_CACHED_HEADS:
                    self._known.clear()
                self._known[key] = known
        request, environ = known
        own = {"REMOTE_PORT": str(port)}
        if asked.digits:
            own["CONTENT_LENGTH"] = asked.digits
        return request, environ | own

    def _parse(self, asked: RawRequest, connection: Connection) -> tuple[Any, dict[str, Any]]:
        request = next(http.get_parser(self._cfg, [asked.head, HEADERS_END], connection.client))
        _check(request)
        _read_connection(request)
        _, environ = wsgi.create(request, None, connection.client, connection.server, self._cfg)
        environ["wsgi.multithread"] = True
        for bound in ("gunicorn.socket", "wsgi.early_hints", "wsgi.input"):
            environ.pop(bound)  # to this one connection
        request.body = request.unreader = None
        return request, environ


def _check(request: Any) -> None:
    """Refuse what gunicorn lets pass, and proxies could take for something else."""
    if request.version not in ((1, 0), (1, 1)):
        raise errors.InvalidHTTPVersion(request.version)
    hosts = sum(name == "HOST" for name, _ in request.headers)
    if hosts > 1 or (hosts == 0 and request.version == (1, 1)):
        raise ValueError("a request needs one Host")


def _read_connection(request: Any) -> None:
    """Honour each of several options in Connection; gunicorn knows only those that stand alone."""
    lists = [value for name, value in request.headers if name == "CONNECTION"]
    options = {option.strip().lower() for value in lists for option in value.split(",")}
    if "close" in options:
        request.force_close()
    elif "keep-alive" in options:
        request.headers = [each for each in request.headers if each[0] != "CONNECTION"]
        request.headers.append(("CONNECTION", "keep-alive"))
