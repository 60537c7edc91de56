"""The gunicorn worker: one loop has every socket, and answers small requests itself.

The loop reads requests until they are whole and sends answers as fast as they are taken, so that a
slow client holds no thread (``service.server.connection``). With small pictures, handing each to a
thread and back, and the threads' contest for the interpreter, would cost more than the work
(docs/decisions/0007). So POSTs are answered by the loop: each round calls the application for every
one that is there, and iterates the answers after that, so that an application that queues its work
in the call and waits for it in the iteration gets it into one batch. What takes longer the
application postpones, or refuses at once if too much of that waits already; it is called again by
one of a few threads. Pages, metrics and the like go to two other threads, which use a part of a
core at most; probes are answered by the loop.

Knows nothing of images. Builds on gunicorn 26's arbiter, parser and response. There is no access
log; ``max_requests``, ``pre_request`` and ``post_request`` are not honoured.
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

# A round ends when it has this many requests or has taken so long, and answers them.
ROUND_REQUESTS = 64
ROUND_S = 0.005
POLL_S = 0.02
POLL_INTERVAL_S = 0.25
# Of a client that waited longer it is looked whether it still does: in an overload, answers for
# those who have left would be most of the work.
WAIT_TIMEOUT_S = 1.0
# Connections on which nothing is asked are closed so long after the order to end: who asks all the
# time is answered, and told that it was the last time.
IDLE_S = 1.0
# For metrics and pages; together these threads use a core at most for this part of the time.
BACKGROUND_THREADS = 2
BACKGROUND_SHARE = 0.25
MAX_PAUSE_S = 1.0
# When a worker has no room for another connection, it closes this part of those that it has.
ROOM_SHARE = 1 / 128
# The loop answers so many probes in a turn, so that a crowd of them holds up no POST.
PROBES_PER_TURN = 8
MAX_WAITING = 512
# Longer bodies have threads of their own: decoding them takes long, and others would wait.
LARGE_POOL_BYTES = 1024 * 1024
# An error costs about 0.25 ms. Clients that ask again at once would take the cores from those who
# are served; so a worker sends so many errors a second, and the others wait for theirs.
REFUSALS_PER_S = 400
REFUSALS_AT_ONCE = 100
# A refusal counts once more for each so many bytes that its client has sent or goes on to send:
# eight clients with 4 MB each would otherwise take half of the machine (reliability.md, row 14).
BYTES_PER_REFUSAL = 256 * 1024
# Bytes that clients send on after a refusal use at most this part of the refusals that time earns,
# so that one fast sender cannot silence the errors of others.
DISCARDED_SHARE = 0.75
# One address may have this part of a worker's connections, a trusted proxy all of them.
ADDRESS_SHARE = 0.75
# Of requests that are not answered yet.
MAX_RECEIVED_BYTES = 256 * 1024 * 1024
# They are counted so often while they arrive: it takes 0.2 ms with 1,000 connections.
COUNT_INTERVAL_S = 0.01
RETRY = "Retry-After: 1\r\n"


class Written(list[bytes]):
    """What gunicorn's response takes for a socket.

    It writes an answer's head and body with a call each; here one ``send`` has both. It is not
    a part of ``PendingResponse``: in a cycle of references, bodies would live until the next
    garbage collection.
    """

    def sendall(self, data: bytes) -> None:
        self.append(bytes(data))


class PendingResponse:
    """A request, and its answer while it is made."""

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
        asked: RawRequest,
    ) -> None:
        self.connection = connection
        self.size = len(asked.body)
        self.is_upload = asked.is_upload
        self.queues = False
        self.environ = environ
        self.written = Written()
        self.response = wsgi.Response(request, self.written, cfg)
        self.body: Iterable[bytes] = ()

    def call(self, application: Any) -> None:
        """The first half: the application is called."""
        self.body = application(self.environ, self.response.start_response)

    def iterate(self) -> None:
        """The second half: what it answers is gathered."""
        try:
            for part in self.body:
                self.response.write(part)
            self.response.close()
        finally:
            if hasattr(self.body, "close"):
                self.body.close()


def _failure(work: Callable[[], None]) -> BaseException | None:
    """Do ``work``; the exception that ended it, if one did."""
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - the loop answers it, or raises it again
        return error
    return None


class RequestPool(Struct):
    """Threads for one kind of request, how many are with them, and the bytes of their bodies.

    A thread works for ``share`` of the time while more requests wait.
    """

    threads: ThreadPoolExecutor
    share: float = 1.0
    count: int = 0
    size: int = 0


class LoopWorker(Worker):  # type: ignore[misc]  # gunicorn has no types
    """See the module."""

    options: ServerOptions

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.alive: bool
        self.sockets: list[Any]
        self._connections: dict[Connection, None] = {}
        # Since when, and in that order: whoever is left out is first in the next round.
        self._readable: dict[Connection, float] = {}
        self._round: dict[Connection, PendingResponse] = {}
        self._of_origin: Counter[str] = Counter()
        self._probes = self._queued = 0
        self._waiting_probes: deque[PendingResponse] = deque()
        self._refusals: deque[tuple[Connection, bytes, float]] = deque()
        self._may_refuse, self._refilled = float(REFUSALS_AT_ONCE), time.monotonic()
        self._discarded_bytes = 0
        self._ending = self._deaf = self._listens_alone = False
        self._next_poll = self._next_look = self._next_count = 0.0

    def init_process(self) -> None:
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
        self._max_of_origin = self.options.max_connections_per_address or default
        super().init_process()

    def run(self) -> None:
        self._poller.register(self._done.fileno(), selectors.EVENT_READ, self._done.run_callbacks)
        if not self.sockets:  # only now: whom a worker welcomes before it has loaded would wait
            self.sockets, self._listens_alone = [self._listen()], True
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
            sys.exit(Arbiter.WORKER_BOOT_ERROR)  # and the arbiter: another fares no better
        self.log.info("listening on %s port %d", host, port)
        return listener

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM: answer what is asked, then end."""
        if self.alive:
            self.alive = False
            self._done.defer(lambda: None)  # wakes the poller

    def _drain(self) -> None:
        """End without losing a request.

        First /readyz says no, while everything goes on, so that proxies look elsewhere. Then nobody
        is accepted any more, and each answer says that it is the last on its connection.
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
        for listener in self.sockets if self._listens_alone else ():
            reject_new_connections(listener)  # not the arbiter's: other workers accept from that
        settled = time.monotonic() + RECONCILE_TIMEOUT_S
        while time.monotonic() < settled:  # whom the kernel has welcomed already is welcome
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
        self._deaf = True
        idle_until = time.monotonic() + IDLE_S
        while self._connections and (now := time.monotonic()) < ends:
            self._turn()
            if now > idle_until:
                self._dispatch(0)  # who has asked already is not idle
                idle = [c for c in self._connections if c.state is ConnectionState.IDLE]
                for each in [c for c in idle if c not in self._readable]:
                    self._close(each)

    def _turn(self, wait_s: float = POLL_INTERVAL_S) -> None:
        """One round: what is readable now, and what becomes so while that is being taken.

        For the first of it ``wait_s`` at most.
        """
        self.notify()
        now = time.monotonic()
        if self._handover:
            self._handover.beat(now)
        if self._refusals:
            wait_s = min(wait_s, 1 / REFUSALS_PER_S)
        if len(self._readable) < ROUND_REQUESTS or now >= self._next_poll:
            # With a crowd waiting already, being told of it again would cost a tenth of a round.
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
            except Exception:  # whatever one client brings about, it is the end of no other
                self.log.exception("a connection is given up")
                self._close(connection)
            if not self._readable:
                self._dispatch(0)
        answered, self._round = self._round, {}
        for answering in answered.values():
            self._finish(answering, _failure(answering.iterate))
            if (now := time.monotonic()) > ends + ROUND_S:  # a slow model, and many who ask it
                self.notify()
                ends = now
        self._send_refusals(now)
        if now >= self._next_look:
            self._next_look = now + POLL_INTERVAL_S
            self._dispatch(0)  # what has arrived in time is not late
            self._close_late(now)
            if self._handover:
                with contextlib.suppress(OSError):  # no descriptor is free: the next time, then
                    self._handover.find_peers()

    def _call_waiting_probes(self, ends: float) -> None:
        """Call the application for a turn's share of probes, while the round lasts."""
        while self._waiting_probes and self._probes < PROBES_PER_TURN and time.monotonic() < ends:
            self._call(self._waiting_probes.popleft())

    def _dispatch(self, timeout_s: float) -> None:
        for key, _ in self._poller.select(timeout_s):
            key.data(key.fileobj)

    def _accept(self, listener: socket.socket) -> bool:
        """Accept many who knock, as one a round would let a crowd of hundreds wait for seconds.

        Whether there may be more.
        """
        for _ in range(ROUND_REQUESTS):
            try:
                client, _ = listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._make_room()
                elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                    self.log.warning("nobody could be accepted: %s", error)
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

        None when it is closed again: the client has gone, its address has more than its share, or
        the kernel has no memory to watch another socket.
        """
        if len(self._connections) >= self._max_connections:
            self._make_room()
        try:
            names = client.getpeername(), client.getsockname()
            connection = Connection(client, *names, self._limits)
            self._watch(connection, selectors.EVENT_READ)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.ECONNRESET):
                self.log.warning("nobody could be accepted: %s", error)
            client.close()
            return None
        self._connections[connection] = None
        if origin := connection.origin:
            self._of_origin[origin] += 1
            if self._of_origin[origin] > self._max_of_origin:
                self._make_room(origin)
        return connection if connection in self._connections else None

    def _make_room(self, origin: str | None = None) -> None:
        """Close a few connections, of ``origin`` if that is given, to free descriptors for others.

        Slow clients' go first, then the idlest; a connection with a request that was not read yet
        goes after all others of its kind, and one whose request is answered now stays. To sort
        1,000 takes 1.6 ms: one at a time, a client that connects 700 times a second would have all
        of the loop.
        """
        now = time.monotonic()
        closable = [
            each
            for each in self._connections
            if each.state is not ConnectionState.WORKING and origin in (None, each.origin)
        ]
        by_loss = lambda each: (each in self._readable, *each.closing_order(now))  # noqa: E731
        room = max(1, int(ROOM_SHARE * (self._max_of_origin if origin else self._max_connections)))
        for connection in nsmallest(room, closable, key=by_loss):
            self._close(connection)
        if not closable and self._refusals:
            self._close(self._refusals.popleft()[0])

    def _close_late(self, now: float) -> None:
        """Close the connections whose time for the next step is over.

        Not all at once: a crowd that came together would hold the loop when its time is over.
        """
        late = [c for c in self._connections if c.deadline <= now and c not in self._readable]
        for connection in late[:ROUND_REQUESTS]:
            if connection.state is ConnectionState.READING:
                self._refuse(connection, 408, "the request did not arrive in its time")
            else:
                self._close(connection)

    def _read(self, connection: Connection, waited_s: float = 0.0) -> None:
        """Receive from ``connection``; what is whole is answered, or called in this round."""
        if self._is_passed_on(connection) or not self._receive(connection):
            return
        try:
            asked = connection.take()
        except HeadTooLong:
            self._refuse(connection, 431, "the head of the request is too long")
            return
        except OSError as error:
            self.log.warning("no memory for the body of a request: %s", error)
            self._refuse(connection, 503, "too many large requests arrive at once")
            return
        if asked is not None:
            if waited_s > WAIT_TIMEOUT_S and connection.has_hung_up():
                self._close(connection)
            else:
                self._ask(connection, asked)
        elif connection.ended:
            self._close(connection)
        elif connection.expects():
            with contextlib.suppress(OSError):
                connection.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif connection.received_bytes > RECEIVE_BYTES and time.monotonic() >= self._next_count:
            self._next_count = time.monotonic() + COUNT_INTERVAL_S
            self._make_space(0)

    def _receive(self, connection: Connection) -> bool:
        """Receive what has arrived; whether it may be a request."""
        count = 0
        try:
            count = connection.receive()
        except BlockingIOError:
            pass  # its next request has arrived with the last one
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
        """Pass a connection on whose request would wait here, to a worker with less to do."""
        busy = self._handover and self._queued and connection.is_untouched
        if not (busy and self._handover and self._handover.give(connection.sock)):
            return False
        self._close(connection)
        return True

    def _make_space(self, size: int) -> bool:
        """Refuse those who have sent most and are not done, until ``size`` bytes more may come.

        Whether they may. Who is slow with a large body would keep out everybody else's.
        """
        if sum(pool.size for pool in self._pools()) + size > MAX_RECEIVED_BYTES:
            return False  # that would help nobody
        while self._received() + size > MAX_RECEIVED_BYTES:
            sending = [each for each in self._connections if each.state is ConnectionState.READING]
            if not sending:
                return False
            most = max(sending, key=lambda each: each.received_bytes)
            self._refuse(most, 503, "too many large requests arrive at once")
        return True

    def _received(self) -> int:
        """Bytes of requests that are not answered yet."""
        arriving = sum(each.received_bytes for each in self._connections)
        waiting = sum(each.size for each in self._waiting_probes)
        return arriving + waiting + sum(pool.size for pool in self._pools())

    def _pools(self) -> tuple[RequestPool, ...]:
        return self._postponed, self._large, self._background

    def _pool(self, answering: PendingResponse, postponed: Postpone) -> RequestPool:
        """The threads for a request that is too long for the loop."""
        if postponed.background:
            return self._background
        return self._large if answering.size > LARGE_POOL_BYTES else self._postponed

    def _ask(self, connection: Connection, asked: RawRequest) -> None:
        """Have the application called: here, or in a thread."""
        connection.work()
        try:
            request, environ = self._heads.read(asked, connection)
        except Exception as error:  # noqa: BLE001 - gunicorn's parser raises many kinds
            too_long = isinstance(error, http_errors.LimitRequestHeaders)
            self._refuse(connection, 431 if too_long else 400, str(error) or "no request")
            return
        environ["wsgi.input"] = asked.open_body()
        if self._ending:
            environ[ENDING] = True
        answering = PendingResponse(connection, request, environ, self.cfg, asked)
        is_old = connection.is_old() and not connection.received  # nothing asked behind it
        if self._deaf or not asked.complete or is_old:
            answering.response.force_close()
        if self._probes >= PROBES_PER_TURN and not asked.is_upload:
            self._watch(connection, 0)
            self._waiting_probes.append(answering)
        else:
            self._call(answering)

    def _call(self, answering: PendingResponse) -> None:
        """Call the application in the loop; its answer is iterated at the end of the round."""
        environ = answering.environ
        environ[IN_LOOP] = answering.size
        environ[WAITING] = self._postponed.count + self._large.count
        try:
            answering.call(self.wsgi)
        except Postpone as postponed:
            del environ[IN_LOOP], environ[WAITING]
            environ["wsgi.input"].seek(0)
            answering.queues = postponed.queues
            self._to_thread(answering, self._pool(answering, postponed))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is answered
            self._fail(answering.connection, error)
        else:
            self._probes += not answering.is_upload
            self._round[answering.connection] = answering

    def _to_thread(self, answering: PendingResponse, pool: RequestPool) -> None:
        size = answering.size
        if pool.count >= MAX_WAITING or (size and not self._make_space(size)):
            self._refuse(
                answering.connection, 503, "too many requests wait already", answering.size
            )
            return
        self._watch(answering.connection, 0)
        pool.count += 1
        pool.size += size
        self._queued += answering.queues
        self._report_load()

        def answer() -> None:
            answering.call(self.wsgi)
            answering.iterate()

        def done(error: BaseException | None) -> None:
            pool.count -= 1
            pool.size -= size
            self._queued -= answering.queues
            self._report_load()
            self._finish(answering, error)

        def work() -> None:
            began = time.thread_time()
            failure = _failure(answer)
            self._done.defer(done, failure)
            if pool.share < 1 and pool.count > 1:
                used_s = time.thread_time() - began
                time.sleep(min(MAX_PAUSE_S, used_s / pool.share - used_s))

        pool.threads.submit(work)

    def _report_load(self) -> None:
        """Tell the other workers how many requests wait in this one for each other."""
        if self._handover and self._handover.load != NEVER:
            self._handover.load = self._queued

    def _finish(self, answering: PendingResponse, error: BaseException | None) -> None:
        """Send what the application has answered, or that it failed with ``error``."""
        connection = answering.connection
        if isinstance(error, Exception):
            self._fail(connection, error)
            return
        if error is not None:  # SystemExit, for example: it ends the worker
            raise error
        connection.keep = not answering.response.should_close()
        data = b"".join(answering.written)
        if answering.is_upload and answering.response.status_code >= HTTPStatus.BAD_REQUEST:
            self._hold_refusal(connection, data, answering.size)
        else:
            self._send(connection, data)

    def _hold_refusal(self, connection: Connection, data: bytes, size: int) -> None:
        """Have a refusal, of a request of ``size`` bytes, sent when its time has come."""
        connection.work()
        self._watch(connection, 0)
        self._readable.pop(connection, None)
        self._refusals.append((connection, data, 1 + size / BYTES_PER_REFUSAL))

    def _send_refusals(self, now: float) -> None:
        """Send the refusals whose time has come, in their order."""
        earned = (now - self._refilled) * REFUSALS_PER_S
        earned -= min(self._discarded_bytes / BYTES_PER_REFUSAL, DISCARDED_SHARE * earned)
        self._discarded_bytes = 0
        self._may_refuse, self._refilled = min(REFUSALS_AT_ONCE, self._may_refuse + earned), now
        while self._refusals and self._may_refuse >= 1:
            connection, data, price = self._refusals.popleft()
            self._may_refuse = max(-REFUSALS_AT_ONCE, self._may_refuse - price)  # debt has an end
            self._send(connection, data)

    def _fail(self, connection: Connection, error: Exception) -> None:
        request_id = self._refuse(connection, 500, "something went wrong on our side")
        self.log.error("the application failed at %s", request_id, exc_info=error)
        error.__traceback__ = None  # its frames refer to it, and hold the request's body

    def _refuse(self, connection: Connection, status: int, detail: str, size: int = 0) -> str:
        """Answer without the application, and listen to that client no more; the request's id.

        ``size`` are the bytes of its body, if ``connection`` has handed them over.
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
        """Send what the client takes; when it has taken all, listen to it again."""
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
            return  # another event of the same poll closed it to make room
        if connection.state is ConnectionState.WRITING:
            self._write(connection)
        elif connection not in self._round:  # its next request, or its end, comes after its answer
            self._readable.setdefault(connection, time.monotonic())

    def _watch(self, connection: Connection, events: int) -> None:
        """Be told when ``connection`` can be read (or written); 0: of nothing."""
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
            return  # one event of a poll closed it to make room; another of the same was its own
        self._watch(connection, 0)
        self._readable.pop(connection, None)
        del self._connections[connection]
        if origin := connection.origin:
            self._of_origin[origin] -= 1
            if not self._of_origin[origin]:
                del self._of_origin[origin]
        connection.sock.close()
