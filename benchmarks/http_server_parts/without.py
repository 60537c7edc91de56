"""Worker classes for ``gunicorn --worker-class``: our worker without one of its parts.

They override private parts of the worker, so that the worker itself needs no switch. If those parts
change, these classes must change, too.
"""

from typing import Any

from service.server import gunicorn_worker
from service.server.connection import Connection, RawRequest
from service.server.gunicorn_worker import LoopWorker, PendingResponse, _failure
from service.server.request_parser import HeaderCache


class ParsedHeads(HeaderCache):
    """Parses every head with gunicorn's parser, even if it has parsed the same head before."""

    def read(self, asked: RawRequest, connection: Connection) -> tuple[Any, dict[str, Any]]:
        return self._parse(asked, connection)


class WithoutHeaderCache(LoopWorker):
    def init_process(self) -> None:
        gunicorn_worker.HeaderCache = ParsedHeads  # type: ignore[attr-defined]
        super().init_process()


class WithoutRounds(LoopWorker):
    """Iterates and sends each answer before it calls the application for the next request."""

    def _call(self, answering: PendingResponse) -> None:
        super()._call(answering)
        if self._round.pop(answering.connection, None):  # neither postponed nor failed
            self._finish(answering, _failure(answering.iterate))


class WithoutFilter(LoopWorker):
    """Closes its listener while the kernel still completes handshakes for it."""

    def init_process(self) -> None:
        gunicorn_worker.reject_new_connections = lambda listener: None  # type: ignore[attr-defined]
        super().init_process()
