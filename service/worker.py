"""The gunicorn worker: gthread, whose main loop answers small requests itself, many in a round.

gthread hands every request from its loop to a thread and back. With small pictures those
hand-overs, and the threads' contest for the interpreter, cost more than the work
(docs/decisions/0007). So here a POST that has arrived whole, and is small, is answered by the loop:
each round calls the application for every such request that is there, and iterates the answers
after that, so that an application that queues its work in the call and waits for it in the
iteration gets it into one batch. Whatever is large, slow to arrive or not a POST goes to a thread
as in gthread.

Knows nothing of images. Builds on gunicorn 26's ``ThreadWorker`` and its connection, parser and
response classes. In the loop there is no access log, and ``max_requests``, ``pre_request`` and
``post_request`` are not honoured.
"""

import errno
import re
import selectors
import socket
import time
from collections.abc import Iterable
from functools import partial
from io import BytesIO
from typing import Any

from gunicorn import http
from gunicorn.http import wsgi
from gunicorn.workers.gthread import TConn, ThreadWorker

IN_LOOP = "convoy.in_loop"
"""In the environment of a request that the loop answers: it must not take long."""

SMALL_BYTES = 64 * 1024
# A round ends when it has this many requests or has taken so long, and answers them.
ROUND_REQUESTS = 64
ROUND_S = 0.005
POLL_S = 0.02
# Of a client that waited longer it is looked whether it still does: in an overload, answers for
# those who have left would be most of the work.
PATIENCE_S = 1.0

# Heads that are remembered, and the longest of them.
HEADS, HEAD_BYTES = 1024, 1024

_HEADERS_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*(?=\r\n)", re.IGNORECASE)
# Whoever sends one of these expects a conversation, or a body of another form.
_NOT_WHOLE = re.compile(rb"\r\n(?:expect|transfer-encoding|upgrade|http2-settings):", re.IGNORECASE)


class Postpone(Exception):
    """Raised by an application whose work is too long for the loop; a thread calls it again."""


class Answering:
    """A request of this round: its connection, its bytes, and its answer while it is made.

    gunicorn writes an answer's head and body with a call each; here they are gathered, so that
    one ``send`` has both.
    """

    __slots__ = ("body", "connection", "data", "gathered", "request", "response")

    def __init__(self, connection: Any, data: bytes) -> None:
        self.connection = connection
        self.data = data
        self.gathered: list[bytes] = []
        self.request: Any = None
        self.response: Any = None
        self.body: Iterable[bytes] = ()

    def sendall(self, data: bytes) -> None:
        """What gunicorn's response takes for a socket's."""
        self.gathered.append(bytes(data))


class LoopWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """See the module."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # Since when, and in that order: whoever is left out is first in the next round.
        self._readable: dict[Any, float] = {}
        self._round: dict[Any, Answering] = {}
        self._heads: dict[Any, tuple[Any, dict[str, Any]]] = {}
        self._next_murder = 0.0
        self._next_poll = 0.0

    def accept(self, listener: socket.socket) -> None:
        """Accept all who knock: one a round would let a crowd of hundreds wait for seconds.

        Their first requests are waited for in the loop, where a silent connection costs no thread.
        """
        while self.nr_conns < self.worker_connections:
            try:
                client, address = listener.accept()
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EWOULDBLOCK):
                    raise
                return
            if client.family != socket.AF_UNIX:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = TConn(self.cfg, client, address, listener.getsockname())
            connection.set_timeout()
            self.nr_conns += 1
            self.keepalived_conns.append(connection)
            self.poller.register(
                client, selectors.EVENT_READ, partial(self.on_client_socket_readable, connection)
            )

    def on_client_socket_readable(self, conn: Any, client: socket.socket) -> None:
        if conn not in self._round:  # its next request, or its end, comes after its answer
            self._readable.setdefault(conn, time.monotonic())

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """One round: what is readable now, and what becomes so while that is being taken."""
        if not self.alive:
            self._close_idle()
            if not self.nr_conns:
                return  # else gthread would wait for an event of nobody's until its time is up
        now = time.monotonic()
        if len(self._readable) < ROUND_REQUESTS or now >= self._next_poll:
            # With a crowd waiting already, being told of it again would cost a tenth of a round.
            self._next_poll = now + POLL_S
            super().wait_for_and_dispatch_events(0 if self._readable else timeout)
        round_: dict[Any, Answering] = {}
        self._round = round_
        ends = time.monotonic() + ROUND_S
        while self._readable and len(round_) < ROUND_REQUESTS and time.monotonic() < ends:
            connection = next(iter(self._readable))
            waited_s = time.monotonic() - self._readable.pop(connection)
            if (answering := self._take(connection, waited_s)) is not None:
                round_[connection] = answering
            if not self._readable:
                super().wait_for_and_dispatch_events(0)
        self._round = {}
        for answering in round_.values():
            self._answer(answering)
            if (now := time.monotonic()) > ends + ROUND_S:  # a slow model, and many who ask it
                self.notify()
                ends = now

    def murder_keepalived(self) -> None:
        """Close connections that were silent for too long; once a second, as none is reordered."""
        now = time.monotonic()
        if now < self._next_murder:
            return
        self._next_murder = now + 1
        for connection in [each for each in self.keepalived_conns if each.timeout <= now]:
            self._close(connection)

    def _close_idle(self) -> None:
        """Do not let connections on which nothing is asked hold up the end of the worker."""
        super().wait_for_and_dispatch_events(0)
        for connection in [each for each in self.keepalived_conns if each not in self._readable]:
            self._close(connection)

    def finish_request(self, conn: Any, fs: Any) -> None:
        """As in gthread; and what the client sent behind the answered request is next.

        The poller would not report it: it has been read.
        """
        super().finish_request(conn, fs)
        if (data := _read_ahead(conn)) and conn in self.keepalived_conns:
            conn.parser.unreader.unread(data)
            self._readable[conn] = time.monotonic()

    def _take(self, connection: Any, waited_s: float) -> Answering | None:
        """Read from ``connection``; if a whole small request is there, call the application."""
        data = _read_ahead(connection)
        try:
            received = connection.sock.recv(SMALL_BYTES)
            data += received
            if not data or (waited_s > PATIENCE_S and _has_hung_up(connection)):
                self._close(connection)
                return None
        except BlockingIOError:
            if not data:
                return None
        except OSError:
            self._close(connection)
            return None
        if not is_whole_post(data):
            self._to_thread(connection, data)
            return None
        answering = Answering(connection, data)
        try:
            self._call(answering)
        except Postpone:
            self._to_thread(connection, data)
            return None
        except Exception as error:  # noqa: BLE001 - as in gthread: whatever it is, it is answered
            self._fail(answering, error)
            return None
        return answering

    def _call(self, answering: Answering) -> None:
        head, _, body = answering.data.partition(_HEADERS_END)
        answering.request, environ = self._read_head(head, answering.connection)
        answering.response = wsgi.Response(answering.request, answering, self.cfg)
        environ["wsgi.input"] = BytesIO(body)
        answering.body = self.wsgi(environ, answering.response.start_response)

    def _read_head(self, head: bytes, connection: Any) -> tuple[Any, dict[str, Any]]:
        """gunicorn's request and an environment of its own, without the body.

        A client sends the same head again and again, save the length of what it brings; what
        gunicorn made of one is remembered. That takes a quarter of the work off a small picture.
        """
        client, port = connection.client[:2] if connection.client else ("", "")  # "": no TCP
        same, length = _without_length(head)
        key = same, client, connection.server
        if (known := self._heads.get(key)) is None:
            request = next(http.get_parser(self.cfg, [head, _HEADERS_END], connection.client))
            _, environ = wsgi.create(request, None, connection.client, connection.server, self.cfg)
            environ[IN_LOOP] = environ["wsgi.multithread"] = True
            for bound in ("gunicorn.socket", "wsgi.early_hints", "wsgi.input"):
                environ.pop(bound)  # to this one connection
            request.body = request.unreader = None
            known = request, environ
            if len(head) <= HEAD_BYTES:
                if len(self._heads) == HEADS:
                    self._heads.clear()
                self._heads[key] = known
        request, environ = known
        own = {"REMOTE_PORT": str(port)} | ({"CONTENT_LENGTH": length} if length else {})
        return request, environ | own

    def _answer(self, answering: Answering) -> None:
        """Iterate the application's answer and send it."""
        connection, response = answering.connection, answering.response
        # As in gthread: a worker that ends keeps none, and nobody keeps a place from all others.
        if not self.alive or len(self.keepalived_conns) > self.max_keepalived:
            response.force_close()
        try:
            for part in answering.body:
                response.write(part)
            response.close()
            if hasattr(answering.body, "close"):
                answering.body.close()
        except Exception as error:  # noqa: BLE001 - as in gthread: whatever it is, it is answered
            self._fail(answering, error)
            return
        data = b"".join(answering.gathered)
        try:
            sent = connection.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close(connection)
            return
        if sent < len(data):
            self._send_in_thread(connection, data[sent:], not response.should_close())
        elif response.should_close():
            self._close(connection)
        else:
            connection.set_timeout()

    def _fail(self, answering: Answering, error: Exception) -> None:
        connection = answering.connection
        self.handle_error(answering.request, connection.sock, connection.client, error)
        self._close(connection)

    def _leave_loop(self, connection: Any) -> None:
        self.poller.unregister(connection.sock)
        self.keepalived_conns.remove(connection)
        self._readable.pop(connection, None)

    def _close(self, connection: Any) -> None:
        self._leave_loop(connection)
        self.nr_conns -= 1
        connection.close()

    def _to_thread(self, connection: Any, data: bytes) -> None:
        """Let a thread go on with what was read, as gthread would with an unread connection."""
        self._leave_loop(connection)
        connection.init()
        connection.parser.unreader.unread(data)
        connection.data_ready = True
        self.enqueue_req(connection)

    def _send_in_thread(self, connection: Any, data: bytes, keep: bool) -> None:
        """Send the rest of an answer to a client that reads more slowly than it asks."""
        self._leave_loop(connection)

        def send() -> bool:
            connection.sock.setblocking(True)
            connection.sock.sendall(data)
            return keep

        future = self.tpool.submit(send)
        future.add_done_callback(
            lambda done: self.method_queue.defer(self.finish_request, connection, done)
        )


def _without_length(head: bytes) -> tuple[bytes, str | None]:
    """``head`` without the digits of its one Content-Length, and those; else as it is, and None.

    Whether two of them may stand in one head is gunicorn's to judge, each time.
    """
    found = _LENGTH.search(head + b"\r\n")
    if found is None or head.lower().count(b"content-length") != 1:
        return head, None
    return head[: found.start(1)] + head[found.end(1) :], found[1].decode()


def _read_ahead(connection: Any) -> bytes:
    """Take what a thread's parser has read beyond the request that it answered."""
    if connection.parser is None:
        return b""
    data: bytes = connection.parser.unreader.take_buffered()
    return data


def _has_hung_up(connection: Any) -> bool:
    """Whether the client sends no more: then, after a wait, it has most likely gone."""
    try:
        return not connection.sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False


def is_whole_post(data: bytes) -> bool:
    """Whether ``data`` is one POST, head and body, and nothing after it."""
    if not data.startswith(b"POST "):
        return False
    end = data.find(_HEADERS_END)
    if end < 0:
        return False
    head = data[: end + 2]
    length = _LENGTH.search(head)
    if length is None or _NOT_WHOLE.search(head):
        return False
    return len(data) == end + len(_HEADERS_END) + int(length[1])
