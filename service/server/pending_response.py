"""``PendingResponse``: a request whose answer is being made, in two halves."""

from collections.abc import Callable, Iterable
from typing import Any

from gunicorn.http import wsgi

from service.server.sockets.connection import Connection
from service.server.sockets.request_reader import RawRequest


class Written(list[bytes]):
    """Collects an answer; gunicorn's response takes it for a socket.

    gunicorn sends an answer's head and body with two calls. Here, one ``send`` sends both. This is
    not part of ``PendingResponse``, because that would make a cycle of references, and request
    bodies would stay in memory until the next garbage collection.
    """

    def sendall(self, data: bytes) -> None:
        """Keep a copy of ``data``; nothing is sent yet."""
        self.append(bytes(data))


class PendingResponse:
    """A request whose answer is being made."""

    __slots__ = (
        "body",
        "connection",
        "environ",
        "is_upload",
        "queues",
        "response",
        "size",
        "written",
    )

    def __init__(
        self,
        connection: Connection,
        request: Any,
        environ: dict[str, Any],
        cfg: Any,
        raw: RawRequest,
    ) -> None:
        self.connection = connection
        self.size = len(raw.body)
        self.is_upload = raw.is_upload
        self.queues = False
        self.environ = environ
        self.written = Written()
        self.response = wsgi.Response(request, self.written, cfg)
        self.body: Iterable[bytes] = ()

    def call(self, application: Any) -> None:
        """The first half: call the application."""
        self.body = application(self.environ, self.response.start_response)

    def iterate(self) -> None:
        """The second half: collect what the application answers."""
        try:
            for part in self.body:
                self.response.write(part)
            self.response.close()
        finally:
            if hasattr(self.body, "close"):
                self.body.close()


def failure(work: Callable[[], None]) -> BaseException | None:
    """Run ``work``, and return the exception that it raised, or None."""
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - the loop answers it, or raises it again
        return error
    return None
