"""Signed webhooks: how they are signed, and a receiver by which they wake the puller.

Signed as Standard Webhooks says (standardwebhooks.com), which is also MLflow's scheme under other
header names: base64 of HMAC-SHA256 over ``id.timestamp.body``.
"""

import base64
import binascii
import hmac
import logging
import re
import socket
import socketserver
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from threading import Lock, Thread
from typing import Any

from registry.errors import UsageError, WebhookInvalid

log = logging.getLogger(__name__)

SECRET_MIN_BYTES = 16
CLOCK_TOLERANCE_S = 300
# Id, timestamp, signature: Standard Webhooks' and MLflow's.
HEADERS = (
    ("webhook-id", "webhook-timestamp", "webhook-signature"),
    ("x-mlflow-delivery-id", "x-mlflow-timestamp", "x-mlflow-signature"),
)
# Visible ASCII without the dot, which separates it from the timestamp in what is signed.
DELIVERY_ID = re.compile(r"[!-\-/-~]{1,256}")

BODY_MAX_BYTES = 64 * 1024
CONNECTIONS = 16
CONNECTION_S = 10.0  # of one that never pauses for as long as TIMEOUT_S but never ends either
POLL_S = 0.5  # between two looks whether one lasts too long, or the receiver is to close
DELIVERIES_REMEMBERED = 1000
TIMEOUT_S = 5.0


def parse_secret(text: str) -> bytes:
    """The key that ``text`` stands for: ``whsec_`` and base64, or else its own UTF-8 bytes.

    MLflow knows no ``whsec_``: it signs with the text itself, so give it a secret without.

    Raises:
        UsageError: it is no base64, or shorter than 16 bytes.
    """
    if text.startswith("whsec_"):
        try:
            secret = base64.b64decode(text.removeprefix("whsec_"), validate=True)
        except (binascii.Error, ValueError) as error:
            raise UsageError("what follows whsec_ in the secret must be base64") from error
    else:
        secret = text.encode()
    if len(secret) < SECRET_MIN_BYTES:
        raise UsageError(
            f"the secret has {len(secret)} bytes; it must have at least {SECRET_MIN_BYTES}"
        )
    return secret


def sign(secret: bytes, delivery_id: str, timestamp: int, body: bytes) -> str:
    """The signature of a delivery, ``v1,…``. ``timestamp`` is in seconds since the epoch."""
    content = b"%s.%d.%s" % (delivery_id.encode(), timestamp, body)
    digest = hmac.digest(secret, content, "sha256")
    return f"v1,{base64.b64encode(digest).decode()}"


def verify(secret: bytes, headers: Mapping[str, str], body: bytes) -> str:
    """The id of a delivery whose sender knows ``secret`` and sent it in these minutes.

    ``headers`` may be written in any case, and be Standard Webhooks' or MLflow's. The signature may
    be several, separated by spaces; one that fits is enough.

    Raises:
        WebhookInvalid: a header is missing or has no such form, the timestamp is more than 5
            minutes from this machine's clock, or no signature fits.
    """
    lowered = {name.lower(): value for name, value in headers.items()}
    for names in HEADERS:
        if all(name in lowered for name in names):
            delivery_id, timestamp, signatures = (lowered[name] for name in names)
            break
    else:
        raise WebhookInvalid(f"the headers must have {' or '.join(map(', '.join, HEADERS))}")
    if not DELIVERY_ID.fullmatch(delivery_id):
        raise WebhookInvalid(f"the id is {delivery_id!r}; it must be visible ASCII without a dot")
    if not re.fullmatch("[0-9]{1,12}", timestamp):
        raise WebhookInvalid(f"the timestamp is {timestamp!r}; it must be in seconds")
    if abs(time.time() - int(timestamp)) > CLOCK_TOLERANCE_S:
        raise WebhookInvalid(f"the timestamp {timestamp} is over {CLOCK_TOLERANCE_S} s from now")
    right = sign(secret, delivery_id, int(timestamp), body).encode()
    if not any(hmac.compare_digest(right, each) for each in signatures.encode().split()):
        raise WebhookInvalid("no signature fits the body and the secret")
    return delivery_id


class Receiver:
    """Listens for ``POST /wake`` and calls ``wake`` for each signed delivery, once for each id.

    What the body says is never read: whoever is woken asks the registry again, so that a delivery
    that was forged, lost, doubled or late can do no more than cost or save one look. ``wake`` is
    called on a connection's thread and must return at once. Speaks plain HTTP and answers with
    empty bodies: 204, 401 (signature), 404, 405, 411 (no length) or 413 (over 64 KiB).
    """

    def __init__(self, host: str, port: int, secret: bytes, wake: Callable[[], None]) -> None:
        """Take ``port``, or a free one for 0.

        Raises:
            UsageError: the address cannot be listened at.
        """
        try:
            self._server = _Server(host, port, secret, wake)
        except (OSError, OverflowError) as error:
            raise UsageError(f"cannot listen for webhooks at {host}:{port}: {error}") from error
        self._thread = Thread(
            target=self._server.serve_forever, args=(POLL_S,), name="webhook-receiver", daemon=True
        )

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop listening. Whoever is connected is answered, or dropped with the process."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    """A thread for each connection, but few at once and none for long.

    Not ``http.server``'s own, which asks DNS for this machine's name before it listens.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(self, host: str, port: int, secret: bytes, wake: Callable[[], None]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.secret = secret
        self._wake = wake
        self._since_s: dict[Any, float] = {}  # each open connection
        self._seen: dict[str, None] = {}  # as a set, oldest first
        self._lock = Lock()
        super().__init__((host, port), _Handler)

    def wake_once(self, delivery_id: str) -> None:
        """Wake, unless a delivery of that id did so before."""
        with self._lock:
            if delivery_id in self._seen:
                return
            self._seen[delivery_id] = None
            if len(self._seen) > DELIVERIES_REMEMBERED:
                del self._seen[next(iter(self._seen))]
        self._wake()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for one more connection; without, it is closed."""
        if len(self._since_s) >= CONNECTIONS:
            return False
        self._since_s[request] = time.monotonic()
        return True

    def shutdown_request(self, request: Any) -> None:
        self._since_s.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End what lasts too long: to the timeout alone a byte a second would be quick enough."""
        for request, since_s in list(self._since_s.items()):
            if time.monotonic() - since_s > CONNECTION_S:
                with suppress(OSError):  # it ended meanwhile
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("the connection of %s failed", client_address[0], exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = TIMEOUT_S
    default_request_version = "HTTP/1.0"  # 0.9's answers have no status

    def do_POST(self) -> None:
        if self.path != "/wake":
            return self.send_error(404)
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,20}", length):
            return self.send_error(411)
        if int(length) > BODY_MAX_BYTES:
            return self.send_error(413)
        body = self.rfile.read(int(length))
        try:
            delivery_id = verify(self.server.secret, dict(self.headers.items()), body)
        except WebhookInvalid as error:
            log.debug("a webhook of %s was refused: %s", self.client_address[0], error)
            return self.send_error(401)
        self.server.wake_once(delivery_id)
        return self.send_error(204)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer ``code`` and nothing else: neither our software's name nor the caller's words."""
        if code == 501:  # http.server's word for a method without a do_
            code = 405 if self.path == "/wake" else 404
        log.debug("answered %d to %s", code, self.client_address[0])
        self.send_response_only(code)
        self.send_header("Connection", "close")
        if code != 204:
            self.send_header("Content-Length", "0")
        if code == 405:
            self.send_header("Allow", "POST")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        log.debug("%s: %r", self.client_address[0], format % args)
