"""Worker classes for ``gunicorn --worker-class``: our worker without one of its parts.

They override private parts of the worker, so that the worker itself needs no switch. If those parts
change, these classes must change, too.
"""

from typing import Any

from service.server import gunicorn_worker, request_loop
from service.server.gunicorn_worker import LoopWorker
from service.server.pending_response import PendingResponse, failure
from service.server.request_loop import RequestLoop
from service.server.request_parser import HeaderCache
from service.server.sockets.connection import Connection
from service.server.sockets.request_reader import RawRequest


class ParsedHeads(HeaderCache):
    """Parses every head with gunicorn's parser, even if it has parsed the same head before."""

    def read(self, raw: RawRequest, connection: Connection) -> tuple[Any, dict[str, Any]]:
        return self._parse(raw, connection)


class WithoutHeaderCache(LoopWorker):
    def init_process(self) -> None:
        request_loop.HeaderCache = ParsedHeads  # type: ignore[attr-defined]
        super().init_process()


class SingleRequests(RequestLoop):
    """Iterates and sends each answer before it calls the application for the next request."""

    def _call(self, pending: PendingResponse) -> None:
        super()._call(pending)
        if self._called:  # neither postponed nor failed
            self._called.clear()
            self._finish(pending, failure(pending.iterate))


class WithoutRounds(LoopWorker):
    def init_process(self) -> None:
        gunicorn_worker.RequestLoop = SingleRequests  # type: ignore[attr-defined]
        super().init_process()


class WithoutFilter(LoopWorker):
    """Closes its listener while the kernel still completes handshakes for it."""

    def init_process(self) -> None:
        gunicorn_worker.reject_new_connections = lambda listener: None  # type: ignore[attr-defined]
        super().init_process()
