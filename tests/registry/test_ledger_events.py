"""No line of a ledger is lost on its way to a webhook, and none comes out of order."""

import json
import logging
import queue
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest

from registry import ledger_events
from registry.errors import RegistryUnavailable, UsageError
from registry.home import Home
from registry.ledger import Entry, Ledger
from registry.ledger_events import Sender, Webhook, read_webhooks
from registry.webhooks import Receiver, verify

SECRET = b"sixteen bytes or more"
PATIENCE_S = 20  # of a test that hangs; nothing waits that long


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def write_file(home: Home) -> Callable[[str], Path]:
    home.root.mkdir(parents=True)
    (home.root / "secret").write_text(SECRET.decode() + "\n")

    def write(text: str) -> Path:
        home.webhooks.write_text(text)
        return home.webhooks

    return write


def test_without_the_file_there_are_no_webhooks(home: Home) -> None:
    assert read_webhooks(home.webhooks) == ()


def test_webhooks_are_read_with_their_secrets(write_file) -> None:
    file = write_file(
        """
        [[webhook]]
        url = "https://example.org/hook"
        secret_file = "secret"
        models = ["fashion"]
        [[webhook]]
        url = "http://127.0.0.1:9/"
        secret_file = "secret"
        [[webhook]]
        url = "http://example.org/"
        secret_file = "secret"
        insecure = true
        """
    )
    fashion, local, plain = read_webhooks(file)
    assert fashion == Webhook(url="https://example.org/hook", secret=SECRET, models=("fashion",))
    assert (local.models, plain.url) == (None, "http://example.org/")
    assert repr(fashion) == "Webhook(example.org)"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ("url = 'ftp://example.org/'", "https"),
        # pragma: allowlist nextline secret
        ("url = 'https://me:pw@example.org/'", "without user"),
        ("url = 'https:///path'", "https"),
        ("url = 'https://example.org:99999/'", "[Pp]ort"),
        ("url = 'https://example.org/a b'", "visible ASCII"),
        ("url = 'https://[::1/'", "IPv6"),
        ("url = 'http://example.org/'", "must be https"),
        ("url = 'https://example.org/'\nmodels = []", "length"),
        ("url = 'https://example.org/'\nmodels = ['a/b']", "no model name"),
        ("url = 'https://example.org/'\nsecret = 'x'", "unknown field"),
        ("", "url"),
        ("url = ", "webhooks.toml"),
    ],
)
def test_a_webhook_that_cannot_be_used_is_refused_with_its_file(write_file, fields, why) -> None:
    file = write_file(f"[[webhook]]\nsecret_file = 'secret'\n{fields}")
    with pytest.raises(UsageError, match=why) as refused:
        read_webhooks(file)
    assert str(file) in str(refused.value)


def test_a_secret_that_is_missing_or_weak_is_refused_with_both_files(write_file) -> None:
    file = write_file("[[webhook]]\nurl = 'https://example.org/'\nsecret_file = 'other'")
    for prepare in (lambda path: None, lambda path: path.write_text("weak")):
        prepare(file.parent / "other")
        with pytest.raises(UsageError, match=r"webhooks\.toml.*other"):
            read_webhooks(file)


def test_one_url_twice_is_refused(write_file) -> None:
    one = "[[webhook]]\nurl = 'https://example.org/'\nsecret_file = 'secret'\n"
    with pytest.raises(UsageError, match="same url"):
        read_webhooks(write_file(one * 2))


class Books:
    """A store in memory: real ledgers, and a registry that can be down."""

    def __init__(self, *models: str) -> None:
        self.rows: dict[str, list[tuple[int, bytes]]] = {model: [] for model in models}
        self.failure: Exception | None = None
        self.looked = Event()

    def models(self) -> list[str]:
        if self.failure:
            raise self.failure
        self.looked.set()
        return list(self.rows)

    def ledger(self, name: str) -> Ledger:
        return Ledger(self.rows[name])

    def write(self, name: str, to_version: int, action: str = "promoted") -> None:
        entry = Entry(
            action=action,
            at="2026-11-17T08:00:00+00:00",
            by="me",
            from_version=None,
            to_version=to_version,
        )
        rows = self.rows.setdefault(name, [])
        rows.append((len(rows) + 1, Ledger(rows).continued(entry).to_json()))


class Inbox:
    """A hook's server: answers ``statuses`` in turn, then 204, and keeps what came."""

    def __init__(self, *statuses: int) -> None:
        self.requests: queue.Queue[tuple[dict[str, str], bytes]] = queue.Queue()
        self.go_on = Event()
        self.go_on.set()
        answers = iter(statuses)
        inbox = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                inbox.requests.put((dict(self.headers.items()), body))
                inbox.go_on.wait(PATIENCE_S)
                self.send_response(next(answers, 204))
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def do_GET(self) -> None:
                inbox.requests.put(({}, b'{"followed": true}'))

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.hook = Webhook(url=f"http://127.0.0.1:{self.server.server_port}/", secret=SECRET)

    def take(self) -> tuple[dict[str, str], bytes]:
        return self.requests.get(timeout=PATIENCE_S)

    def lines(self) -> list[tuple[str, int]]:
        """(model, line) of all that came since the last call."""
        came = []
        while not self.requests.empty():
            data = json.loads(self.requests.get()[1])["data"]
            came.append((data["model"], data["line"]))
        return came

    def close(self) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def make_inbox() -> Iterator[Callable[..., Inbox]]:
    made: list[Inbox] = []

    def make(*statuses: int) -> Inbox:
        made.append(Inbox(*statuses))
        return made[-1]

    yield make
    for inbox in made:
        inbox.close()


@pytest.fixture
def books() -> Books:
    return Books("fashion", "digits")


@pytest.fixture
def make_sender(books: Books, home: Home) -> Callable[..., Sender]:
    """A sender whose hooks have all been seen before."""

    def make(*hooks: Webhook) -> Sender:
        sender = Sender(lambda: books, home.deliveries, hooks)
        assert sender.deliver_all()
        return sender

    return make


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed delivery may be tried again without waiting."""
    monkeypatch.setattr(ledger_events, "RETRY_MAX_S", 0.0)


def test_a_line_arrives_signed_and_whole(books: Books, make_inbox, make_sender) -> None:
    inbox = make_inbox()
    sender = make_sender(inbox.hook)
    books.write("fashion", 3, "rolled back")
    assert sender.deliver_all()
    headers, body = inbox.take()
    assert verify(SECRET, headers, body) == headers["webhook-id"]
    assert headers["Content-Type"] == "application/json"
    line = books.ledger("fashion").lines[0]
    assert json.loads(body) == {
        "type": "convoy.ledger.rolled_back",
        "timestamp": "2026-11-17T08:00:00+00:00",
        "data": {
            "model": "fashion",
            "line": 1,
            "stands": True,
            "entry": json.loads(line.entry.to_json()),
        },
    }


def test_lines_arrive_in_order_and_once(books: Books, make_inbox, make_sender) -> None:
    inbox = make_inbox()
    sender = make_sender(inbox.hook)
    for version in (1, 2, 3):
        books.write("fashion", version)
        books.write("digits", version)
    assert sender.deliver_all()
    came = inbox.lines()
    for model in ("fashion", "digits"):
        assert [line for name, line in came if name == model] == [1, 2, 3]
    assert sender.deliver_all()
    assert inbox.lines() == []


def test_a_line_that_cannot_be_read_is_passed_over(books: Books, make_inbox, make_sender) -> None:
    inbox = make_inbox()
    sender = make_sender(inbox.hook)
    books.rows["fashion"].append((1, b"nonsense"))
    books.write("fashion", 1)
    assert sender.deliver_all()
    assert inbox.lines() == [("fashion", 2)]


def test_a_webhook_gets_the_models_that_it_wants(books: Books, make_inbox, make_sender) -> None:
    inbox = make_inbox()
    sender = make_sender(Webhook(url=inbox.hook.url, secret=SECRET, models=("digits",)))
    books.write("fashion", 1)
    books.write("digits", 1)
    assert sender.deliver_all()
    assert inbox.lines() == [("digits", 1)]


def test_a_new_webhook_gets_no_old_lines_but_a_new_model_from_its_first(
    books: Books, make_inbox, make_sender
) -> None:
    for version in (1, 2):
        books.write("fashion", version)
    inbox = make_inbox()
    sender = make_sender(inbox.hook)
    assert inbox.lines() == []
    books.write("fashion", 3)
    books.write("later", 1)
    books.write("later", 2)
    assert sender.deliver_all()
    assert inbox.lines() == [("fashion", 3), ("later", 1), ("later", 2)]


def test_a_webhook_that_wants_one_model_more_gets_no_lines_from_before_it_was_seen(
    books: Books, make_inbox, make_sender
) -> None:
    books.write("fashion", 1)
    inbox = make_inbox()
    make_sender(Webhook(url=inbox.hook.url, secret=SECRET, models=("digits",)))
    books.write("fashion", 2)
    make_sender(inbox.hook)
    assert inbox.lines() == [("fashion", 2)]


def test_how_far_a_webhook_came_outlives_the_sender(books: Books, make_inbox, make_sender) -> None:
    inbox = make_inbox()
    sender = make_sender(inbox.hook)
    books.write("fashion", 1)
    sender.deliver_all()
    books.write("fashion", 2)
    make_sender(inbox.hook)
    assert inbox.lines() == [("fashion", 1), ("fashion", 2)]


def test_a_file_of_deliveries_that_is_damaged_is_named(make_inbox, make_sender, home: Home) -> None:
    inbox = make_inbox()
    make_sender(inbox.hook)
    (file,) = home.deliveries.iterdir()
    file.write_bytes(b"{")
    with pytest.raises(UsageError, match=file.name):
        make_sender(inbox.hook)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("status", [302, 400, 410, 500])
def test_a_refused_line_is_sent_again_under_its_id_and_none_is_skipped(
    books: Books, make_inbox, make_sender, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    inbox = make_inbox(204, status, status)
    sender = make_sender(inbox.hook)
    for version in (1, 2, 3):
        books.write("fashion", version)
    assert [sender.deliver_all() for _ in range(3)] == [False, False, True]
    came = [inbox.take() for _ in range(5)]
    assert inbox.requests.empty()  # above all, no redirect was followed
    assert [json.loads(body)["data"]["line"] for _, body in came] == [1, 2, 2, 2, 3]
    ids = [headers["webhook-id"] for headers, _ in came]
    assert ids[1] == ids[2] == ids[3]
    assert len(set(ids)) == 3
    assert came[1][1] == came[3][1]
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert f"answered {status}" in warnings[0]


def test_a_webhook_that_failed_is_left_alone_for_a_while(
    books: Books, make_inbox, make_sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = make_inbox(500, 500)
    sender = make_sender(inbox.hook)
    now_s = time.monotonic()
    monkeypatch.setattr(ledger_events.random, "uniform", lambda least, most: most)
    monkeypatch.setattr(ledger_events.time, "monotonic", lambda: now_s)
    books.write("fashion", 1)
    for wait_s, tries in ((0.0, 1), (1.9, 0), (0.2, 1), (3.9, 0), (0.2, 1)):
        now_s += wait_s
        sender.deliver_all()
        assert len(inbox.lines()) == tries
    assert sender.deliver_all()


@pytest.mark.usefixtures("at_once")
def test_a_dead_webhook_does_not_stop_another_nor_show_its_url(
    books: Books, make_inbox, make_sender, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = make_inbox()
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    dead = Webhook(url=f"http://127.0.0.1:{port}/token", secret=SECRET)
    sender = make_sender(dead, inbox.hook)
    for version in (1, 2):
        books.write("fashion", version)
        assert not sender.deliver_all()
    assert inbox.lines() == [("fashion", 1), ("fashion", 2)]
    warnings = [each.getMessage() for each in caplog.records if each.name == ledger_events.log.name]
    assert len(warnings) == 1
    assert f"127.0.0.1:{port}" in warnings[0]
    assert "token" not in caplog.text


@pytest.mark.usefixtures("at_once")
def test_a_disk_that_is_full_loses_no_line(
    books: Books, make_inbox, make_sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = make_inbox()
    sender = make_sender(inbox.hook)

    def fail(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    books.write("fashion", 1)
    books.write("fashion", 2)
    with monkeypatch.context() as full:
        full.setattr(ledger_events, "write_atomically", fail)
        assert not sender.deliver_all()
    assert sender.deliver_all()
    assert inbox.lines() == [("fashion", 1), ("fashion", 2)]


def test_a_webhook_is_first_seen_when_the_registry_can_be_read(
    books: Books, make_inbox, home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = make_inbox()
    sender = Sender(lambda: books, home.deliveries, (inbox.hook,))
    books.failure = RegistryUnavailable("down")
    assert not sender.deliver_all()
    assert not sender.deliver_all()
    assert [each.levelno for each in caplog.records] == [logging.WARNING]
    books.write("fashion", 1)
    books.failure = None
    assert sender.deliver_all()
    books.write("fashion", 2)
    assert sender.deliver_all()
    assert inbox.lines() == [("fashion", 2)]


def test_the_registry_is_not_read_for_nobody() -> None:
    def open_store() -> Books:
        raise AssertionError("it was opened")

    assert Sender(open_store, Path("unused"), ()).deliver_all()


@pytest.fixture
def watch() -> Iterator[Callable[..., None]]:
    """Lets a sender watch until the test ends: ``watch(sender, wake, interval_s)``."""
    stop = Event()
    watching: list[tuple[Thread, Event]] = []

    def start(sender: Sender, wake: Event, interval_s: float) -> None:
        thread = Thread(target=sender.watch, args=(stop, wake, interval_s))
        watching.append((thread, wake))
        thread.start()

    yield start
    stop.set()
    for thread, wake in watching:
        wake.set()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_a_watch_looks_at_once_when_it_is_woken(
    books: Books, make_inbox, make_sender, watch
) -> None:
    inbox = make_inbox()
    sender = make_sender(inbox.hook)
    books.looked.clear()
    wake = Event()
    watch(sender, wake, 3600.0)
    assert books.looked.wait(PATIENCE_S)
    books.write("fashion", 1)
    wake.set()
    inbox.take()


def test_a_watch_survives_what_nobody_foresaw(
    books: Books, make_inbox, make_sender, watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = make_inbox()
    sender = make_sender(inbox.hook)
    failures = iter([TypeError("odd")])
    start = sender._start

    def fail_once() -> bool:
        for failure in failures:
            raise failure
        return start()

    monkeypatch.setattr(sender, "_start", fail_once)
    watch(sender, Event(), 0.01)
    assert books.looked.wait(PATIENCE_S)
    books.write("fashion", 1)
    inbox.take()


def test_a_webhook_that_hangs_holds_up_no_other(
    books: Books, make_inbox, make_sender, watch
) -> None:
    hanging, inbox = make_inbox(), make_inbox()
    sender = make_sender(hanging.hook, inbox.hook)
    hanging.go_on.clear()
    watch(sender, Event(), 0.01)
    for version in (1, 2):
        books.write("fashion", version)
        inbox.take()
    hanging.take()
    assert hanging.requests.empty()  # still at its first line
    hanging.go_on.set()
    hanging.take()


def test_a_sender_can_wake_a_receiver(books: Books, make_sender) -> None:
    woken = Event()
    receiver = Receiver("127.0.0.1", 0, SECRET, woken.set)
    receiver.start()
    try:
        sender = make_sender(Webhook(url=f"http://127.0.0.1:{receiver.port}/wake", secret=SECRET))
        books.write("fashion", 1)
        assert sender.deliver_all()
        assert woken.wait(PATIENCE_S)
    finally:
        receiver.close()
