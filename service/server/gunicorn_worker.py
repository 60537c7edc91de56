"""The gunicorn worker: one loop owns every socket and answers small requests itself.

The loop reads each request completely before it calls the application, and sends answers as fast as
clients take them, so a slow client occupies no thread (``service.server.connection``).

For a small image, handing the request to a thread and back costs more than the work itself, because
the threads compete for the interpreter (docs/decisions/0007). So the loop answers POSTs itself. In
each round it first calls the application for every request that has arrived, and then iterates over
the answers. An application that queues its work in the call, and waits for it in the iteration,
thereby gets all requests of a round into one batch.

The application postpones a request that takes longer, and one of a few threads calls it again. If
too many of those wait already, the application refuses the request. Two other threads answer pages
and metrics, and use at most a part of one core. The loop answers probes.

It knows nothing about images. It builds on gunicorn 26's arbiter, parser and response. It writes no
access log, and ignores ``max_requests``, ``pre_request`` and ``post_request``.
"""

import contextlib
import errno
import os
import resource
import secrets
import selectors
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from heapq import nsmallest
from http import HTTPStatus
from types import FrameType
from typing import Any

from gunicorn.arbiter import Arbiter
from gunicorn.http import errors as http_errors
from gunicorn.http import wsgi
from gunicorn.workers.base import Worker
from gunicorn.workers.gthread import PollableMethodQueue
from msgspec import Struct
from msgspec.structs import replace

from service.server.connection import (
    MAX_HEAD_BYTES,
    RECEIVE_BYTES,
    Connection,
    ConnectionState,
    HeadTooLong,
    RawRequest,
)
from service.server.graceful_close import RECONCILE_TIMEOUT_S, reject_new_connections
from service.server.handover import NEVER, Handover
from service.server.protocol import ENDING, IN_LOOP, WAITING, Postpone, ServerOptions
from service.server.request_parser import HeaderCache

# A round stops collecting requests, and answers them, at this count or after this time.
ROUND_REQUESTS = 64
ROUND_S = 0.005
POLL_S = 0.02
POLL_INTERVAL_S = 0.25
# If a client has waited for longer, the worker checks that it is still connected. In an overload,
# most of the work would otherwise go to clients that have left.
WAIT_TIMEOUT_S = 1.0
# A draining worker closes idle connections after this time. If a client sends a request before
# that, the answer has "Connection: close".
IDLE_S = 1.0
# The threads for metrics and pages; together they use at most this share of one core.
BACKGROUND_THREADS = 2
BACKGROUND_SHARE = 0.25
MAX_PAUSE_S = 1.0
# If a worker has no room for another connection, it closes this share of its connections.
ROOM_SHARE = 1 / 128
# The loop answers at most this many probes in a turn, so that many probes do not delay a POST.
PROBES_PER_TURN = 8
MAX_WAITING = 512
# Longer bodies have their own threads, because decoding them would delay other requests.
LARGE_POOL_BYTES = 1024 * 1024
# An error costs about 0.25 ms. Clients that retry at once would take processor time from clients
# that are served. So a worker sends at most this many errors a second, and delays the others.
REFUSALS_PER_S = 400
REFUSALS_AT_ONCE = 100
# A refusal costs one more for every so many bytes that the client has sent or goes on to send.
# Without that, eight clients with 4 MB each took half of the machine (reliability.md, row 14).
BYTES_PER_REFUSAL = 256 * 1024
# Bytes that clients send after a refusal use up at most this share of the refusals that become
# available, so that one fast sender cannot delay all errors of other clients.
DISCARDED_SHARE = 0.75
# One address may have this share of a worker's connections. A trusted proxy may have all of them.
ADDRESS_SHARE = 0.75
# The bytes of all unanswered requests that a worker holds.
MAX_RECEIVED_BYTES = 256 * 1024 * 1024
# While requests arrive, their bytes are counted at most this often: with 1,000 connections, one
# count takes 0.2 ms.
COUNT_INTERVAL_S = 0.01
RETRY = "Retry-After: 1\r\n"


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


def _failure(work: Callable[[], None]) -> BaseException | None:
    """Run ``work``, and return the exception that it raised, or None."""
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - the loop answers it, or raises it again
        return error
    return None


class RequestPool(Struct):
    """The threads for one kind of request.

    ``count`` requests wait or are worked on, and their bodies have ``size`` bytes in total. While
    more than one waits, each thread works for only ``share`` of the time.
    """

    threads: ThreadPoolExecutor
    share: float = 1.0
    count: int = 0
    size: int = 0


class LoopWorker(Worker):  # type: ignore[misc]  # gunicorn has no types
    """The module's docstring describes it."""

    options: ServerOptions

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.alive: bool
        self.sockets: list[Any]
        self._connections: dict[Connection, None] = {}
        # Since when each can be read. The order is kept: a connection that this round does not
        # reach comes first in the next one.
        self._readable: dict[Connection, float] = {}
        self._round: dict[Connection, PendingResponse] = {}
        self._count_by_origin: Counter[str] = Counter()
        self._probes = self._queued = 0
        self._waiting_probes: deque[PendingResponse] = deque()
        self._refusals: deque[tuple[Connection, bytes, float]] = deque()
        self._refusal_credit, self._credited_at = float(REFUSALS_AT_ONCE), time.monotonic()
        self._discarded_bytes = 0
        self._ending = self._has_stopped_listening = self._owns_listener = False
        self._next_poll = self._next_check = self._next_count = 0.0

    def init_process(self) -> None:
        """Make the poller and the threads, then load the application and run the loop."""
        self._heads = HeaderCache(self.cfg)
        self._limits = replace(self.options.limits, keep_alive_s=self.cfg.keepalive)
        self._poller = selectors.DefaultSelector()
        self._done = PollableMethodQueue()
        self._done.init()
        self._postponed = RequestPool(ThreadPoolExecutor(self.cfg.threads, "work"))
        self._large = RequestPool(ThreadPoolExecutor(self.cfg.threads, "large"))
        threads = ThreadPoolExecutor(BACKGROUND_THREADS, "background")
        self._background = RequestPool(threads, BACKGROUND_SHARE / BACKGROUND_THREADS)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_connections = min(self.cfg.worker_connections, max(16, soft - 128))
        default = max(1, int(ADDRESS_SHARE * self._max_connections))
        folder = self.options.handover_folder
        self._handover = Handover(folder) if folder else None
        self._max_per_origin = self.options.max_connections_per_address or default
        super().init_process()

    def run(self) -> None:
        """Answer requests until SIGTERM or until the arbiter has died, then drain."""
        self._poller.register(self._done.fileno(), selectors.EVENT_READ, self._done.run_callbacks)
        if not self.sockets:
            # Listen only after loading: a client accepted earlier would wait for the load.
            self.sockets, self._owns_listener = [self._listen()], True
        for listener in self.sockets:
            listener.setblocking(False)
            self._poller.register(listener, selectors.EVENT_READ, self._accept)
        if self._handover:
            self._poller.register(self._handover.sock, selectors.EVENT_READ, self._take_over)
            self._handover.load = 0
        while self.alive and os.getppid() == self.ppid:
            self._turn()
        self._drain()
        for pool in self._pools():
            pool.threads.shutdown(wait=False, cancel_futures=True)

    def _listen(self) -> socket.socket:
        (host, port), family = self.options.address, self.options.family
        try:
            listener = socket.create_server(
                (host, port),
                family=family,
                backlog=self.cfg.backlog,
                reuse_port=True,
                dualstack_ipv6=family == socket.AF_INET6,
            )
        except OSError as error:
            self.log.error("cannot listen on %s port %d: %s", host, port, error)
            # Ends the arbiter too, because another worker would fail in the same way.
            sys.exit(Arbiter.WORKER_BOOT_ERROR)
        self.log.info("listening on %s port %d", host, port)
        return listener

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM: answer the accepted requests, then end."""
        if self.alive:
            self.alive = False
            self._done.defer(lambda: None)  # wakes the poller

    def _drain(self) -> None:
        """End without losing a request.

        First only /readyz fails, while the worker still serves, so that proxies choose another
        worker. Then it accepts no new connections, and every answer has "Connection: close".
        """
        self._ending = True
        now = time.monotonic()
        ends, unready_until = (
            now + self.cfg.graceful_timeout - 1,
            now + self.options.shutdown_delay_s,
        )
        while time.monotonic() < unready_until:
            self._turn()
        if self._handover:
            self._handover.load = NEVER
        for listener in self.sockets if self._owns_listener else ():
            reject_new_connections(listener)  # only its own: other workers share the arbiter's
        settled = time.monotonic() + RECONCILE_TIMEOUT_S
        while time.monotonic() < settled:  # accept clients whose handshake was under way
            self._turn(RECONCILE_TIMEOUT_S)
        for listener in self.sockets:
            self._poller.unregister(listener)
            while self._accept(listener):
                pass
            listener.close()
        if self._handover:
            self._poller.unregister(self._handover.sock)
            self._take_over(self._handover.sock)
            self._handover.close()
            self._handover = None
        self._has_stopped_listening = True
        idle_until = time.monotonic() + IDLE_S
        while self._connections and (now := time.monotonic()) < ends:
            self._turn()
            if now > idle_until:
                self._dispatch(0)  # a client whose request has just arrived is not idle
                idle = [c for c in self._connections if c.state is ConnectionState.IDLE]
                for each in [c for c in idle if c not in self._readable]:
                    self._close(each)

    def _turn(self, wait_s: float = POLL_INTERVAL_S) -> None:
        """Run one round: read and answer the requests that are there or arrive in the meantime.

        Waits at most ``wait_s`` for the first event.
        """
        self.notify()
        now = time.monotonic()
        if self._handover:
            self._handover.beat(now)
        if self._refusals:
            wait_s = min(wait_s, 1 / REFUSALS_PER_S)
        if len(self._readable) < ROUND_REQUESTS or now >= self._next_poll:
            # With many readable connections known already, polling for them again would cost a
            # tenth of a round.
            self._next_poll = now + POLL_S
            self._dispatch(0 if self._readable or self._waiting_probes else wait_s)
        self._round, self._probes = {}, 0
        ends = time.monotonic() + ROUND_S
        self._call_waiting_probes(ends)
        while self._readable and len(self._round) < ROUND_REQUESTS and time.monotonic() < ends:
            connection = next(iter(self._readable))
            waited_s = time.monotonic() - self._readable.pop(connection)
            try:
                self._read(connection, waited_s)
            except Exception:  # an error of one connection must not end the others
                self.log.exception("closed a connection after an unexpected error")
                self._close(connection)
            if not self._readable:
                self._dispatch(0)
        answered, self._round = self._round, {}
        for pending in answered.values():
            self._finish(pending, _failure(pending.iterate))
            if (now := time.monotonic()) > ends + ROUND_S:  # a slow model with many requests
                self.notify()
                ends = now
        self._send_refusals(now)
        if now >= self._next_check:
            self._next_check = now + POLL_INTERVAL_S
            self._dispatch(0)  # so that requests that arrived in time do not count as late
            self._close_late(now)
            if self._handover:
                with contextlib.suppress(OSError):  # no free descriptor: try again next time
                    self._handover.find_peers()

    def _call_waiting_probes(self, ends: float) -> None:
        """Call the application for up to ``PROBES_PER_TURN`` waiting probes, until ``ends``."""
        while self._waiting_probes and self._probes < PROBES_PER_TURN and time.monotonic() < ends:
            self._call(self._waiting_probes.popleft())

    def _dispatch(self, timeout_s: float) -> None:
        for key, _ in self._poller.select(timeout_s):
            key.data(key.fileobj)

    def _accept(self, listener: socket.socket) -> bool:
        """Accept up to ``ROUND_REQUESTS`` waiting clients; True if more may wait.

        With one a round, the last of several hundred clients would wait for seconds.
        """
        for _ in range(ROUND_REQUESTS):
            try:
                client, _ = listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._make_room()
                elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                    self.log.warning("cannot accept a connection: %s", error)
                return False
            self._open(client)
        return True

    def _take_over(self, sock: socket.socket) -> None:
        """Take the connections that other workers have passed on."""
        assert self._handover is not None
        while taken := self._handover.take():
            for client in taken:
                if connection := self._open(client):
                    self._readable[connection] = time.monotonic()

    def _open(self, client: socket.socket) -> Connection | None:
        """Add a client's connection.

        Returns:
            None if the connection was closed again: the client has left, its address has too many
            connections, or the kernel has no memory to watch another socket.
        """
        if len(self._connections) >= self._max_connections:
            self._make_room()
        try:
            names = client.getpeername(), client.getsockname()
            connection = Connection(client, *names, self._limits)
            self._watch(connection, selectors.EVENT_READ)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.ECONNRESET):
                self.log.warning("cannot accept a connection: %s", error)
            client.close()
            return None
        self._connections[connection] = None
        if origin := connection.origin:
            self._count_by_origin[origin] += 1
            if self._count_by_origin[origin] > self._max_per_origin:
                self._make_room(origin)
        return connection if connection in self._connections else None

    def _make_room(self, origin: str | None = None) -> None:
        """Close a few connections, only of ``origin`` if given, to free file descriptors.

        It closes connections of slow clients first, then those that have been in their state for
        longest; connections with an unread request come after all others. A connection whose
        request is being answered stays open. Sorting 1,000 connections takes 1.6 ms. If this closed
        one at a time, a client that connects 700 times a second would use up the loop's time.
        """
        now = time.monotonic()
        closable = [
            each
            for each in self._connections
            if each.state is not ConnectionState.WORKING and origin in (None, each.origin)
        ]
        by_loss = lambda each: (each in self._readable, *each.closing_order(now))  # noqa: E731
        room = max(1, int(ROOM_SHARE * (self._max_per_origin if origin else self._max_connections)))
        for connection in nsmallest(room, closable, key=by_loss):
            self._close(connection)
        if not closable and self._refusals:
            self._close(self._refusals.popleft()[0])

    def _close_late(self, now: float) -> None:
        """Close connections whose deadline has passed, at most ``ROUND_REQUESTS`` at a time.

        Many clients that connected together would otherwise block the loop together.
        """
        late = [c for c in self._connections if c.deadline <= now and c not in self._readable]
        for connection in late[:ROUND_REQUESTS]:
            if connection.state is ConnectionState.READING:
                self._refuse(connection, 408, "the request arrived too slowly")
            else:
                self._close(connection)

    def _read(self, connection: Connection, waited_s: float = 0.0) -> None:
        """Receive from ``connection``, and handle its next request if that is complete."""
        if self._is_passed_on(connection) or not self._receive(connection):
            return
        try:
            raw = connection.take()
        except HeadTooLong:
            self._refuse(
                connection, 431, f"the head of the request has more than {MAX_HEAD_BYTES:,} bytes"
            )
            return
        except OSError as error:
            self.log.warning("cannot allocate memory for a request's body: %s", error)
            self._refuse(connection, 503, "too many large requests at once; try again later")
            return
        if raw is not None:
            if waited_s > WAIT_TIMEOUT_S and connection.has_hung_up():
                self._close(connection)
            else:
                self._handle(connection, raw)
        elif connection.ended:
            self._close(connection)
        elif connection.expects():
            with contextlib.suppress(OSError):
                connection.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif connection.received_bytes > RECEIVE_BYTES and time.monotonic() >= self._next_count:
            self._next_count = time.monotonic() + COUNT_INTERVAL_S
            self._make_space(0)

    def _receive(self, connection: Connection) -> bool:
        """Receive what has arrived; True if the connection may hold a request to handle."""
        count = 0
        try:
            count = connection.receive()
        except BlockingIOError:
            pass  # the client may have sent its next request together with the last one
        except OSError:
            self._close(connection)
            return False
        if connection.state is not ConnectionState.LINGERING:
            return True
        self._discarded_bytes += count
        if connection.ended:
            self._close(connection)
        return False

    def _is_passed_on(self, connection: Connection) -> bool:
        """Pass ``connection`` to a less loaded worker if its request would have to wait here."""
        busy = self._handover and self._queued and connection.is_untouched
        if not (busy and self._handover and self._handover.give(connection.sock)):
            return False
        self._close(connection)
        return True

    def _make_space(self, size: int) -> bool:
        """Refuse arriving requests, the largest first, until ``size`` more bytes fit the limit.

        Otherwise clients that send large bodies slowly could keep out all others.

        Returns:
            Whether ``size`` more bytes fit.
        """
        if sum(pool.size for pool in self._pools()) + size > MAX_RECEIVED_BYTES:
            return False  # refusing arriving requests would not free enough
        while self._received() + size > MAX_RECEIVED_BYTES:
            sending = [each for each in self._connections if each.state is ConnectionState.READING]
            if not sending:
                return False
            largest = max(sending, key=lambda each: each.received_bytes)
            self._refuse(largest, 503, "too many large requests at once; try again later")
        return True

    def _received(self) -> int:
        """Bytes of all unanswered requests."""
        arriving = sum(each.received_bytes for each in self._connections)
        waiting = sum(each.size for each in self._waiting_probes)
        return arriving + waiting + sum(pool.size for pool in self._pools())

    def _pools(self) -> tuple[RequestPool, ...]:
        return self._postponed, self._large, self._background

    def _pool(self, pending: PendingResponse, postponed: Postpone) -> RequestPool:
        """The threads for a postponed request."""
        if postponed.background:
            return self._background
        return self._large if pending.size > LARGE_POOL_BYTES else self._postponed

    def _handle(self, connection: Connection, raw: RawRequest) -> None:
        """Have the application called for a request, in the loop or in a thread."""
        connection.work()
        try:
            request, environ = self._heads.read(raw, connection)
        except Exception as error:  # noqa: BLE001 - gunicorn's parser raises many kinds
            too_long = isinstance(error, http_errors.LimitRequestHeaders)
            self._refuse(
                connection, 431 if too_long else 400, str(error) or "the request is malformed"
            )
            return
        environ["wsgi.input"] = raw.open_body()
        if self._ending:
            environ[ENDING] = True
        pending = PendingResponse(connection, request, environ, self.cfg, raw)
        is_old = connection.is_old() and not connection.received  # no pipelined request follows
        if self._has_stopped_listening or not raw.complete or is_old:
            pending.response.force_close()
        if self._probes >= PROBES_PER_TURN and not raw.is_upload:
            self._watch(connection, 0)
            self._waiting_probes.append(pending)
        else:
            self._call(pending)

    def _call(self, pending: PendingResponse) -> None:
        """Call the application in the loop; the end of the round iterates over its answer."""
        environ = pending.environ
        environ[IN_LOOP] = pending.size
        environ[WAITING] = self._postponed.count + self._large.count
        try:
            pending.call(self.wsgi)
        except Postpone as postponed:
            del environ[IN_LOOP], environ[WAITING]
            environ["wsgi.input"].seek(0)
            pending.queues = postponed.queues
            self._to_thread(pending, self._pool(pending, postponed))
        except Exception as error:  # noqa: BLE001 - the client gets an answer to every error
            self._fail(pending.connection, error)
        else:
            self._probes += not pending.is_upload
            self._round[pending.connection] = pending

    def _to_thread(self, pending: PendingResponse, pool: RequestPool) -> None:
        size = pending.size
        if pool.count >= MAX_WAITING or (size and not self._make_space(size)):
            self._refuse(
                pending.connection, 503, "too many requests wait; try again later", pending.size
            )
            return
        self._watch(pending.connection, 0)
        pool.count += 1
        pool.size += size
        self._queued += pending.queues
        self._report_load()

        def answer() -> None:
            pending.call(self.wsgi)
            pending.iterate()

        def done(error: BaseException | None) -> None:
            pool.count -= 1
            pool.size -= size
            self._queued -= pending.queues
            self._report_load()
            self._finish(pending, error)

        def work() -> None:
            began = time.thread_time()
            failure = _failure(answer)
            self._done.defer(done, failure)
            if pool.share < 1 and pool.count > 1:
                used_s = time.thread_time() - began
                time.sleep(min(MAX_PAUSE_S, used_s / pool.share - used_s))

        pool.threads.submit(work)

    def _report_load(self) -> None:
        """Tell the other workers how many requests queue in this one."""
        if self._handover and self._handover.load != NEVER:
            self._handover.load = self._queued

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
            self._hold_refusal(connection, data, pending.size)
        else:
            self._send(connection, data)

    def _hold_refusal(self, connection: Connection, data: bytes, size: int) -> None:
        """Queue the refusal of a request of ``size`` bytes, to keep to ``REFUSALS_PER_S``."""
        connection.work()
        self._watch(connection, 0)
        self._readable.pop(connection, None)
        self._refusals.append((connection, data, 1 + size / BYTES_PER_REFUSAL))

    def _send_refusals(self, now: float) -> None:
        """Send queued refusals in their order, as many as ``REFUSALS_PER_S`` allows now."""
        earned = (now - self._credited_at) * REFUSALS_PER_S
        earned -= min(self._discarded_bytes / BYTES_PER_REFUSAL, DISCARDED_SHARE * earned)
        self._discarded_bytes = 0
        self._refusal_credit, self._credited_at = (
            min(REFUSALS_AT_ONCE, self._refusal_credit + earned),
            now,
        )
        while self._refusals and self._refusal_credit >= 1:
            connection, data, price = self._refusals.popleft()
            # The lower limit bounds how long one costly refusal delays the next.
            self._refusal_credit = max(-REFUSALS_AT_ONCE, self._refusal_credit - price)
            self._send(connection, data)

    def _fail(self, connection: Connection, error: Exception) -> None:
        detail = "the service failed to answer this request; tell its operator the request id"
        request_id = self._refuse(connection, 500, detail)
        self.log.error("the application failed on request %s", request_id, exc_info=error)
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
        body = self.options.describe_error(status, phrase, detail, request_id)
        head = (
            f"HTTP/1.1 {status} {phrase}\r\nConnection: close\r\nX-Request-Id: {request_id}\r\n"
            "Content-Type: application/problem+json\r\nX-Content-Type-Options: nosniff\r\n"
            f"{RETRY if status == 503 else ''}Content-Length: {len(body)}\r\n\r\n"
        )
        size += connection.received_bytes
        connection.keep = False
        connection.forget()
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self._hold_refusal(connection, head.encode() + body, size)
        else:
            self._send(connection, head.encode() + body)
        return request_id

    def _send(self, connection: Connection, data: bytes) -> None:
        connection.unsent = memoryview(data)
        self._write(connection)

    def _write(self, connection: Connection) -> None:
        """Send as much as the client takes now; after the last byte, wait for its next request."""
        try:
            if not connection.send():
                self._watch(connection, selectors.EVENT_WRITE)
            elif connection.keep:
                connection.rest()
                self._watch(connection, selectors.EVENT_READ)
                if connection.received or connection.ended:
                    self._readable[connection] = time.monotonic()
            else:
                connection.linger()
                self._watch(connection, selectors.EVENT_READ)
        except OSError:
            self._close(connection)

    def _on_event(self, connection: Connection) -> None:
        if connection not in self._connections:
            return  # an earlier event of this poll closed it to make room
        if connection.state is ConnectionState.WRITING:
            self._write(connection)
        elif connection not in self._round:  # its answer is sent before its next request is read
            self._readable.setdefault(connection, time.monotonic())

    def _watch(self, connection: Connection, events: int) -> None:
        """Set the events of ``connection`` that the loop watches; 0 for none."""
        if connection.watched == events:
            return
        if not events:
            self._poller.unregister(connection.sock)
        else:
            change = self._poller.modify if connection.watched else self._poller.register
            change(connection.sock, events, lambda sock: self._on_event(connection))
        connection.watched = events

    def _close(self, connection: Connection) -> None:
        if connection not in self._connections:
            return  # an earlier event of this poll closed it to make room
        self._watch(connection, 0)
        self._readable.pop(connection, None)
        del self._connections[connection]
        if origin := connection.origin:
            self._count_by_origin[origin] -= 1
            if not self._count_by_origin[origin]:
                del self._count_by_origin[origin]
        connection.sock.close()
