"""``RequestLoop``: reads requests, has the application answer them, and sends the answers.

For a small image, handing the request to a thread and back costs more than the work itself, because
the threads compete for the interpreter (docs/decisions/0007). So the loop answers POSTs itself. In
each turn it first calls the application for every request that has arrived, and then iterates over
the answers. An application that queues its work in the call, and waits for it in the iteration,
thereby gets all requests of a turn into one batch.

The application postpones a request that takes longer, and one of a few threads calls it again. If
too many of those wait already, the application refuses the request. Two other threads answer pages
and metrics, and use at most a part of one core. The loop answers probes.
"""

import contextlib
import secrets
import time
from collections import deque
from http import HTTPStatus
from typing import Any, Protocol

from gunicorn.http import errors as http_errors

from service.server.pending_response import PendingResponse, failure
from service.server.protocol import ENDING, IN_LOOP, WAITING, Postpone, ServerOptions
from service.server.refusals import REFUSALS_PER_S, RefusalQueue
from service.server.request_parser import HeaderCache
from service.server.request_pools import RequestPools
from service.server.sockets.client_sockets import ClientSockets
from service.server.sockets.connection import Connection, ConnectionState
from service.server.sockets.handover import NEVER, Handover
from service.server.sockets.request_reader import (
    MAX_HEAD_BYTES,
    RECEIVE_BYTES,
    HeadTooLong,
    RawRequest,
)

# A turn stops collecting requests, and answers them, at this count or after this time.
TURN_REQUESTS = 64
TURN_S = 0.005
POLL_S = 0.02
POLL_INTERVAL_S = 0.25
# If a client has waited for longer, the worker checks that it is still connected. In an overload,
# most of the work would otherwise go to clients that have left.
WAIT_TIMEOUT_S = 1.0
# The loop answers at most this many probes in a turn, so that many probes do not delay a POST.
PROBES_PER_TURN = 8
# The bytes of all unanswered requests that a worker holds.
MAX_RECEIVED_BYTES = 256 * 1024 * 1024
# While requests arrive, their bytes are counted at most this often: with 1,000 connections, one
# count takes 0.2 ms.
COUNT_INTERVAL_S = 0.01
TOO_MANY_BYTES = "too many large requests at once; try again later"
RETRY = "Retry-After: 1\r\n"


class GunicornWorker(Protocol):
    """What the loop uses of its worker."""

    cfg: Any
    log: Any
    options: ServerOptions
    wsgi: Any
    """The application."""

    def notify(self) -> None:
        """Tell gunicorn that the worker is alive."""


class RequestLoop:
    """Answers the requests of one worker's clients.

    It has many attributes and methods because they are the steps of one turn, which all read and
    change what the turn has collected.
    """

    def __init__(
        self,
        worker: GunicornWorker,
        sockets: ClientSockets,
        pools: RequestPools,
        handover: Handover | None,
    ) -> None:
        """Prepare the loop of a gunicorn ``worker``, which loads its application before a turn."""
        self._worker = worker
        self._sockets = sockets
        self._pools = pools
        self.handover = handover
        """The other workers; None if there are none, or if this worker takes no more clients."""
        self._heads = HeaderCache(worker.cfg)
        self._called: list[PendingResponse] = []
        self._probes = 0
        self._waiting_probes: deque[PendingResponse] = deque()
        self._refusals = RefusalQueue()
        self._next_poll = self._next_check = self._next_count = 0.0
        self.ending = False
        """Whether the worker ends soon; the application then answers that it is not ready."""
        self.last_answers = False
        """Whether each answer is the last on its connection."""

    def turn(self, wait_s: float = POLL_INTERVAL_S) -> None:
        """Read and answer the requests that are there or arrive in the meantime.

        Waits at most ``wait_s`` for the first event.
        """
        self._worker.notify()
        now = time.monotonic()
        if self.handover:
            self.handover.beat(now)
        if self._refusals:
            wait_s = min(wait_s, 1 / REFUSALS_PER_S)
        readable = self._sockets.readable
        if len(readable) < TURN_REQUESTS or now >= self._next_poll:
            # With many readable connections known already, polling for them again would cost a
            # tenth of a turn.
            self._next_poll = now + POLL_S
            self._sockets.poll(0 if readable or self._waiting_probes else wait_s)
        self._called, self._probes = [], 0
        ends = time.monotonic() + TURN_S
        while self._waiting_probes and self._probes < PROBES_PER_TURN and time.monotonic() < ends:
            self._call(self._waiting_probes.popleft())
        while readable and len(self._called) < TURN_REQUESTS and time.monotonic() < ends:
            self._read_next(readable)
        called, self._called = self._called, []
        for pending in called:
            self._finish(pending, failure(pending.iterate))
            if (now := time.monotonic()) > ends + TURN_S:  # a slow model with many requests
                self._worker.notify()
                ends = now
        for connection, data in self._refusals.due(now):
            self._sockets.send(connection, data)
        if now >= self._next_check:
            self._next_check = now + POLL_INTERVAL_S
            self._check(now)

    def _read_next(self, readable: dict[Connection, float]) -> None:
        """Read from the connection that has waited for longest."""
        connection = next(iter(readable))
        waited_s = time.monotonic() - readable.pop(connection)
        try:
            self._read(connection, waited_s)
        except Exception:  # an error of one connection must not end the others
            self._worker.log.exception("closed a connection after an unexpected error")
            self._sockets.close(connection)
        if not readable:
            self._sockets.poll(0)

    def _check(self, now: float) -> None:
        """Close connections whose deadline has passed, and look for other workers."""
        self._sockets.poll(0)  # so that requests that arrived in time do not count as late
        for connection in self._sockets.late(now):
            if connection.state is ConnectionState.READING:
                self._refuse(connection, 408, "the request arrived too slowly")
            else:
                self._sockets.close(connection)
        if self.handover:
            with contextlib.suppress(OSError):  # no free descriptor: try again next time
                self.handover.find_peers()

    def _read(self, connection: Connection, waited_s: float) -> None:
        """Receive from ``connection``, and handle its next request if that is complete."""
        if self._is_passed_on(connection) or not self._receive(connection):
            return
        try:
            raw = connection.take()
        except HeadTooLong:
            detail = f"the head of the request has more than {MAX_HEAD_BYTES:,} bytes"
            self._refuse(connection, 431, detail)
            return
        except OSError as error:
            self._worker.log.warning("cannot allocate memory for a request's body: %s", error)
            self._refuse(connection, 503, TOO_MANY_BYTES)
            return
        if raw is not None:
            if waited_s > WAIT_TIMEOUT_S and connection.has_hung_up():
                self._sockets.close(connection)
            else:
                self._handle(connection, raw)
        elif connection.ended:
            self._sockets.close(connection)
        elif connection.reader.expects():
            with contextlib.suppress(OSError):
                connection.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif connection.reader.size > RECEIVE_BYTES and time.monotonic() >= self._next_count:
            self._next_count = time.monotonic() + COUNT_INTERVAL_S
            self._make_space(0)

    def _is_passed_on(self, connection: Connection) -> bool:
        """Pass ``connection`` to a less loaded worker if its request would have to wait here."""
        busy = self.handover and self._pools.queued and connection.is_untouched
        if not (busy and self.handover and self.handover.give(connection.sock)):
            return False
        self._sockets.close(connection)
        return True

    def _receive(self, connection: Connection) -> bool:
        """Receive what has arrived; True if the connection may hold a request to handle."""
        count = 0
        try:
            count = connection.receive()
        except BlockingIOError:
            pass  # the client may have sent its next request together with the last one
        except OSError:
            self._sockets.close(connection)
            return False
        if connection.state is not ConnectionState.LINGERING:
            return True
        self._refusals.count_discarded(count)
        if connection.ended:
            self._sockets.close(connection)
        return False

    def _make_space(self, size: int) -> bool:
        """Refuse arriving requests, the largest first, until ``size`` more bytes fit the limit.

        Otherwise clients that send large bodies slowly could keep out all others.

        Returns:
            Whether ``size`` more bytes fit.
        """
        size += self._pools.size
        if size > MAX_RECEIVED_BYTES:
            return False  # refusing arriving requests would not free enough
        size += sum(each.size for each in self._waiting_probes)
        connections = self._sockets.connections
        while size + sum(each.reader.size for each in connections) > MAX_RECEIVED_BYTES:
            sending = [each for each in connections if each.state is ConnectionState.READING]
            if not sending:
                return False
            largest = max(sending, key=lambda each: each.reader.size)
            self._refuse(largest, 503, TOO_MANY_BYTES)
        return True

    def _handle(self, connection: Connection, raw: RawRequest) -> None:
        """Have the application called for a request, in the loop or in a thread."""
        connection.work()
        try:
            request, environ = self._heads.read(raw, connection)
        except Exception as error:  # noqa: BLE001 - gunicorn's parser raises many kinds
            too_long = isinstance(error, http_errors.LimitRequestHeaders)
            detail = str(error) or "the request is malformed"
            self._refuse(connection, 431 if too_long else 400, detail)
            return
        environ["wsgi.input"] = raw.open_body()
        if self.ending:
            environ[ENDING] = True
        pending = PendingResponse(connection, request, environ, self._worker.cfg, raw)
        # An old connection ends after this answer, if no pipelined request follows.
        is_old = connection.is_old() and not connection.reader.received
        if self.last_answers or not raw.complete or is_old:
            pending.response.force_close()
        if self._probes >= PROBES_PER_TURN and not raw.is_upload:
            self._sockets.pause(connection)
            self._waiting_probes.append(pending)
        else:
            self._call(pending)

    def _call(self, pending: PendingResponse) -> None:
        """Call the application in the loop; the end of the turn iterates over its answer."""
        environ = pending.environ
        environ[IN_LOOP] = pending.size
        environ[WAITING] = self._pools.waiting
        try:
            pending.call(self._worker.wsgi)
        except Postpone as postponed:
            del environ[IN_LOOP], environ[WAITING]
            environ["wsgi.input"].seek(0)
            self._postpone(pending, postponed)
        except Exception as error:  # noqa: BLE001 - the client gets an answer to every error
            self._fail(pending.connection, error)
        else:
            self._probes += not pending.is_upload
            self._called.append(pending)

    def _postpone(self, pending: PendingResponse, postponed: Postpone) -> None:
        """Have a thread answer ``pending``, or refuse it if too many wait."""
        size = pending.size
        pool = self._pools.choose(size, postponed)
        if pool is None or (size and not self._make_space(size)):
            detail = "too many requests wait; try again later"
            self._refuse(pending.connection, 503, detail, size)
            return
        self._sockets.pause(pending.connection)
        pending.queues = postponed.queues
        self._pools.submit(pending, pool, self._worker.wsgi, self._finish_postponed)
        self._report_load()

    def _finish_postponed(self, pending: PendingResponse, error: BaseException | None) -> None:
        self._report_load()
        self._finish(pending, error)

    def _report_load(self) -> None:
        """Tell the other workers how many requests queue in this one."""
        if self.handover and self.handover.load != NEVER:
            self.handover.load = self._pools.queued

    def _finish(self, pending: PendingResponse, error: BaseException | None) -> None:
        """Send the application's answer, or a 500 if it raised ``error``."""
        connection = pending.connection
        if isinstance(error, Exception):
            self._fail(connection, error)
            return
        if error is not None:  # for example SystemExit, which ends the worker
            raise error
        connection.keep = not pending.response.should_close()
        data = b"".join(pending.written)
        if pending.is_upload and pending.response.status_code >= HTTPStatus.BAD_REQUEST:
            self._hold(connection, data, pending.size)
        else:
            self._sockets.send(connection, data)

    def _hold(self, connection: Connection, data: bytes, size: int) -> None:
        """Queue the refusal of a request of ``size`` bytes."""
        self._sockets.pause(connection)
        self._refusals.add(connection, data, size)

    def _fail(self, connection: Connection, error: Exception) -> None:
        detail = "the service failed to answer this request; tell its operator the request id"
        request_id = self._refuse(connection, 500, detail)
        self._worker.log.error("the application failed on request %s", request_id, exc_info=error)
        error.__traceback__ = None  # its frames refer to the error, and hold the request's body

    def _refuse(self, connection: Connection, status: int, detail: str, size: int = 0) -> str:
        """Answer with an error without calling the application, then close the connection.

        Args:
            connection: that of the client.
            status: of HTTP.
            detail: what was wrong, for the client.
            size: the bytes of the request's body, if they are no longer in ``connection``.

        Returns:
            The id of the request.
        """
        phrase = HTTPStatus(status).phrase
        request_id = secrets.token_hex(16)
        body = self._worker.options.describe_error(status, phrase, detail, request_id)
        head = (
            f"HTTP/1.1 {status} {phrase}\r\nConnection: close\r\nX-Request-Id: {request_id}\r\n"
            "Content-Type: application/problem+json\r\nX-Content-Type-Options: nosniff\r\n"
            f"{RETRY if status == 503 else ''}Content-Length: {len(body)}\r\n\r\n"
        )
        size += connection.reader.size
        connection.keep = False
        connection.reader.clear()
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self._hold(connection, head.encode() + body, size)
        else:
            self._sockets.send(connection, head.encode() + body)
        if on_refusal := self._worker.options.on_refusal:
            client = connection.client[0] if connection.client else ""
            on_refusal(self._worker.wsgi, client, status, len(body), request_id)
        return request_id
