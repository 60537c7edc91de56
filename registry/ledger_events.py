"""The ledger's lines as signed webhooks, for whoever wants to hear of decisions.

Knows neither MLflow, whose ledgers it reads through two methods, nor what an event means to whoever
gets it.
"""

import ipaddress
import logging
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Annotated, Protocol
from urllib.parse import urlsplit

import msgspec
import requests
from msgspec import Meta, Struct

from registry.contract import MODEL_NAME, check_model_name, sha256_hex
from registry.errors import ConvoyError, UsageError
from registry.ledger import Ledger, Line
from registry.releases import write_atomically
from registry.webhooks import parse_secret, sign

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
RETRY_MAX_S = 300.0


class Webhook(Struct, frozen=True, kw_only=True):
    """Where the lines of ``models`` (None: of all) go, and what they are signed with."""

    url: str
    secret: bytes
    models: tuple[str, ...] | None = None

    @property
    def host(self) -> str:
        """What may be logged of the URL: the rest of it is a secret with many services."""
        return urlsplit(self.url).netloc

    def __repr__(self) -> str:
        return f"Webhook({self.host})"

    def wants(self, model: str) -> bool:
        return self.models is None or model in self.models


class _Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: str
    secret_file: str
    models: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    insecure: bool = False


class _Tables(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    webhook: tuple[_Table, ...] = ()


def read_webhooks(file: Path) -> tuple[Webhook, ...]:
    """The webhooks of ``file``, in TOML; none when there is no such file.

    Each ``[[webhook]]`` has a ``url``, a ``secret_file`` (relative to the folder of ``file``) and,
    unless it wants all, ``models``. ``http:`` is for this machine only, or with ``insecure``.

    Raises:
        UsageError: ``file`` or a secret cannot be read, or something in it cannot be used.
    """
    try:
        tables = msgspec.toml.decode(file.read_bytes(), type=_Tables).webhook
        hooks = tuple(_webhook(file.parent, table) for table in tables)
        if len({hook.url for hook in hooks}) < len(hooks):
            raise UsageError("two webhooks have the same url; one with the models of both will do")
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.MsgspecError, ValueError, UsageError) as error:
        raise UsageError(f"the webhooks {file} cannot be used: {error}") from error
    return hooks


def _webhook(folder: Path, table: _Table) -> Webhook:
    parts = urlsplit(table.url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise UsageError("a url must be https://host… without user and password")
    if not table.url.isascii() or not table.url.isprintable() or " " in table.url:
        raise UsageError(f"the url at {parts.hostname!r} must be written in visible ASCII")
    _ = parts.port  # raises ValueError for one that is none
    if parts.scheme == "http" and not table.insecure and not _is_loopback(parts.hostname):
        raise UsageError(f"the url at {parts.hostname} must be https, or have insecure = true")
    secret_file = folder / table.secret_file
    try:
        secret = parse_secret(secret_file.read_text(encoding="utf-8").strip())
    except (UsageError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"its secret {secret_file}: {error}") from error
    for model in table.models or ():
        check_model_name(model)
    return Webhook(url=table.url, secret=secret, models=table.models)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Ledgers(Protocol):
    """What the sender needs of a ``ModelStore``."""

    def models(self) -> list[str]: ...

    def ledger(self, name: str) -> Ledger: ...


class Sender:
    """Sends the ledgers' new lines to the webhooks: at least once each, in order for each model.

    A webhook that is new gets the lines that are written after it was first seen, that is after
    the first look that reached the registry; a model that appears later is sent from its first
    line. How far each webhook came lies in the folder ``deliveries`` and outlives the process;
    delete its file there and it is new again. A line that cannot be read is passed over. A ledger
    that became shorter, in a registry that was restored, is quiet until it is as long as it was.

    The store is read once for all, and each webhook that has something to get has a thread:
    ``requests`` bounds the wait for a byte, not for an answer, so a server that drips could hold
    everybody up if they took turns. One sender for a home; one thread at a time may call it.
    """

    def __init__(
        self, open_store: Callable[[], Ledgers], deliveries: Path, hooks: tuple[Webhook, ...]
    ) -> None:
        """Prepare to send.

        Raises:
            UsageError: a file in ``deliveries`` cannot be understood.
        """
        self._open_store = open_store
        self._store: Ledgers | None = None
        self._reachable = True
        self._couriers = [
            _Courier(hook, deliveries / f"{sha256_hex(hook.url.encode())[:32]}.json")
            for hook in hooks
        ]

    def deliver_all(self) -> bool:
        """Send what is new and wait for it; whether every webhook has all there is.

        One that failed lately is left alone until its time has come. Failures are logged.
        """
        reached = self._start()
        for courier in self._couriers:
            courier.join(None)
        return reached and not any(courier.failures for courier in self._couriers)

    def watch(self, stop: Event, wake: Event | None = None, interval_s: float = 2.0) -> None:
        """Send what is new every ``interval_s`` seconds (±20 %) until ``stop`` is set.

        ``wake`` brings the next look forward, and is cleared by it; to end at once, set it after
        ``stop``. What is under way at the end may be sent again by the next sender.
        """
        while not stop.is_set():
            if wake is not None:
                wake.clear()
            try:
                self._start()
            except Exception:  # the edge of a thread: later lines must be sent all the same
                log.exception("webhooks could not be looked after")
            (wake or stop).wait(interval_s * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
        patience_ends_s = time.monotonic() + TIMEOUT_S
        for courier in self._couriers:
            courier.join(max(0.0, patience_ends_s - time.monotonic()))

    def _start(self) -> bool:
        """Set every courier off that is ready; False when the registry could not be read."""
        ready = [courier for courier in self._couriers if courier.is_ready]
        if not ready:
            return True
        try:
            if self._store is None:
                self._store = self._open_store()
            ledgers = {
                name: self._store.ledger(name)
                for name in self._store.models()
                # MLflow may have models of other names; those are not Convoy's.
                if MODEL_NAME.fullmatch(name) and any(courier.reads(name) for courier in ready)
            }
        except (ConvoyError, OSError) as error:
            if self._reachable:
                log.warning("no webhook is sent while the ledgers cannot be read: %s", error)
            self._store, self._reachable = None, False
            return False
        self._reachable = True
        for courier in ready:
            courier.start(ledgers)
        return True


class _NotTaken(ConvoyError):
    """A webhook's server answered that it did not take a line."""


class _Cursor(Struct, kw_only=True):
    """The number of the last line that a webhook got, by model. ``host`` is for people."""

    host: str
    delivered: dict[str, int]


class _Courier:
    """One webhook: how far it came, and the thread that brings it further."""

    def __init__(self, hook: Webhook, file: Path) -> None:
        self.failures = 0
        self._hook = hook
        self._file = file
        self._cursor = _read_cursor(file)
        self._retry_s = 0.0
        self._thread: Thread | None = None

    @property
    def is_ready(self) -> bool:
        """Whether its thread is not at work, and a failure is long enough ago."""
        at_work = self._thread is not None and self._thread.is_alive()
        return not at_work and time.monotonic() >= self._retry_s

    def reads(self, model: str) -> bool:
        """Whether it needs the ledger: at first all, or to want one more would send old lines."""
        return self._cursor is None or self._hook.wants(model)

    def start(self, ledgers: dict[str, Ledger]) -> None:
        if self._cursor is None or any(self._news(self._cursor, ledgers)):
            self._thread = Thread(
                target=self._deliver, args=(ledgers,), name="webhook-sender", daemon=True
            )
            self._thread.start()

    def join(self, timeout_s: float | None) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _news(
        self, cursor: _Cursor, ledgers: dict[str, Ledger]
    ) -> Iterator[tuple[str, Ledger, Line]]:
        for model in filter(self._hook.wants, sorted(ledgers)):
            for line in ledgers[model].lines:
                if line.number > cursor.delivered.get(model, 0):
                    yield model, ledgers[model], line

    def _deliver(self, ledgers: dict[str, Ledger]) -> None:
        try:
            if self._cursor is None:
                first = {name: ledger.last for name, ledger in ledgers.items()}
                cursor = _Cursor(host=self._hook.host, delivered=first)
                write_atomically(self._file, msgspec.json.encode(cursor) + b"\n")
                self._cursor = cursor
            for model, ledger, line in self._news(self._cursor, ledgers):
                # Of the line's digest, not its nonce: that is text of whoever wrote the line.
                delivery_id = f"{model}-{line.number}-{ledger.digests[line.number][:16]}"
                _post(self._hook, delivery_id, _event(model, line))
                self._cursor.delivered[model] = line.number
                write_atomically(self._file, msgspec.json.encode(self._cursor) + b"\n")
                if self.failures:
                    log.info("the webhook at %s takes lines again", self._hook.host)
                self.failures = 0
        except Exception as error:  # noqa: BLE001 - the edge of a thread: whatever it is, try again
            self._note_failure(error)

    def _note_failure(self, error: Exception) -> None:
        if not self.failures:
            has_url = isinstance(error, requests.RequestException)
            log.warning(
                "the webhook at %s fails (%s); trying on",
                self._hook.host,
                type(error).__name__ if has_url else error,
                exc_info=None if isinstance(error, OSError | _NotTaken) else error,
            )
        self.failures += 1
        longest_s = min(RETRY_MAX_S, 2.0 ** min(self.failures, 20))
        self._retry_s = time.monotonic() + longest_s * random.uniform(0.5, 1)  # noqa: S311 - jitter


def _read_cursor(file: Path) -> _Cursor | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Cursor)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{file} cannot be read: {error}; without it, its webhook gets new lines only"
        ) from error


def _event(model: str, line: Line) -> bytes:
    """The body for a line: the same bytes at every try."""
    return msgspec.json.encode(
        {
            "type": f"convoy.ledger.{line.entry.action.replace(' ', '_')}",
            "timestamp": line.entry.at,
            "data": {
                "model": model,
                "line": line.number,
                "stands": line.stands,
                "entry": line.entry,
            },
        }
    )


def _post(hook: Webhook, delivery_id: str, body: bytes) -> None:
    """Deliver ``body``; the answer's own body is not read, and a redirect not followed.

    Raises:
        _NotTaken: the answer is not 2xx.
        requests.RequestException: there is none; its text has the URL in it.
    """
    timestamp = int(time.time())
    headers = {
        "Content-Type": "application/json",
        "webhook-id": delivery_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(hook.secret, delivery_id, timestamp, body),
    }
    with requests.post(
        hook.url, body, headers=headers, timeout=TIMEOUT_S, allow_redirects=False, stream=True
    ) as answer:
        if not 200 <= answer.status_code < 300:
            raise _NotTaken(f"answered {answer.status_code}")
