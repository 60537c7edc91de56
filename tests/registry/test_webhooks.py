"""What is signed and what is not, and a puller that is woken once."""

import logging
import socket
import time
from collections.abc import Iterator

import pytest
import requests

from registry import webhooks
from registry.errors import UsageError, WebhookInvalid
from registry.webhooks import Receiver, parse_secret, sign, verify

SECRET = b"sixteen bytes or more"
PATIENCE_S = 20  # of a test that hangs; nothing waits that long


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


def signed(body: bytes = b"{}", delivery_id: str = "msg_1", age_s: int = 0, secret=SECRET):
    timestamp = int(time.time()) - age_s
    return {
        "webhook-id": delivery_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(secret, delivery_id, timestamp, body),
    }


# Signatures


def test_the_published_vector_of_standard_webhooks_is_met() -> None:
    secret = parse_secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signature = sign(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_what_was_signed_is_verified() -> None:
    assert verify(SECRET, signed(b"body"), b"body") == "msg_1"


def test_header_names_count_in_any_case() -> None:
    headers = {name.title(): value for name, value in signed().items()}
    assert verify(SECRET, headers, b"{}") == "msg_1"


def test_one_fitting_signature_among_several_is_enough() -> None:
    headers = signed()
    headers["webhook-signature"] = f"v1a,AAAA v1,BBBB {headers['webhook-signature']}"
    verify(SECRET, headers, b"{}")


def test_what_mlflow_signs_is_verified() -> None:
    from mlflow.webhooks.delivery import _generate_hmac_signature

    text, timestamp, body = "a secret of MLflow's", str(int(time.time())), '{"entity": "é"}'
    headers = {
        "X-MLflow-Delivery-Id": "8c1f-4d",
        "X-MLflow-Timestamp": timestamp,
        "X-MLflow-Signature": _generate_hmac_signature(text, "8c1f-4d", timestamp, body),
    }
    assert verify(parse_secret(text), headers, body.encode()) == "8c1f-4d"


@pytest.mark.parametrize(
    ("signing", "changed", "why"),
    [
        ({"body": b"other"}, {}, "no signature fits"),
        ({"secret": b"somebody else's secret"}, {}, "no signature fits"),
        ({}, {"webhook-id": "msg_2"}, "no signature fits"),
        ({}, {"webhook-signature": ""}, "no signature fits"),
        ({}, {"webhook-signature": "v1,é"}, "no signature fits"),
        ({"age_s": 400}, {}, "from now"),
        ({"age_s": -400}, {}, "from now"),
        ({}, {"webhook-timestamp": "now"}, "in seconds"),
        ({}, {"webhook-timestamp": "٣"}, "in seconds"),
        ({"delivery_id": "a.b"}, {}, "without a dot"),
        ({"delivery_id": "a\nb"}, {}, "without a dot"),
    ],
)
def test_what_was_not_signed_so_is_refused(signing, changed, why) -> None:
    with pytest.raises(WebhookInvalid, match=why):
        verify(SECRET, signed(**signing) | changed, b"{}")


@pytest.mark.parametrize("missing", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_a_missing_header_is_refused(missing: str) -> None:
    headers = signed()
    del headers[missing]
    with pytest.raises(WebhookInvalid, match="must have"):
        verify(SECRET, headers, b"{}")


@pytest.mark.parametrize("text", ["", "fifteen bytes..", "whsec_c2hvcnQ=", "whsec_not base64"])
def test_a_weak_or_garbled_secret_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(UsageError, match="secret") as refused:
        parse_secret(text)
    assert not text or text not in str(refused.value)


# Receiver


class Wakes:
    """A receiver, and how often it woke."""

    def __init__(self) -> None:
        self.count = 0
        self.receiver = Receiver("127.0.0.1", 0, SECRET, self.wake)
        self.receiver.start()
        self.url = f"http://127.0.0.1:{self.receiver.port}/wake"

    def wake(self) -> None:
        self.count += 1

    def post(self, body: bytes = b"{}", **signing) -> requests.Response:
        return requests.post(self.url, body, headers=signed(body, **signing), timeout=PATIENCE_S)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.receiver.port), timeout=PATIENCE_S)

    def raw(self, request: bytes) -> bytes:
        """All that is answered to ``request``."""
        with self.connect() as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(4096), b""))


@pytest.fixture
def wakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wakes]:
    monkeypatch.setattr(webhooks, "POLL_S", 0.01)
    wakes = Wakes()
    yield wakes
    wakes.receiver.close()


def test_a_signed_delivery_wakes(wakes: Wakes) -> None:
    answer = wakes.post()
    assert (answer.status_code, answer.content, wakes.count) == (204, b"", 1)


def test_an_answer_names_no_software(wakes: Wakes) -> None:
    assert set(wakes.post().headers) == {"Connection"}
    assert set(requests.get(wakes.url, timeout=PATIENCE_S).headers) == {
        "Connection",
        "Content-Length",
        "Allow",
    }


def test_a_delivery_that_comes_again_wakes_once(wakes: Wakes) -> None:
    assert [wakes.post().status_code for _ in range(3)] == [204] * 3
    assert wakes.count == 1
    wakes.post(delivery_id="msg_2")
    assert wakes.count == 2


def test_only_so_many_deliveries_are_remembered(
    wakes: Wakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "DELIVERIES_REMEMBERED", 2)
    for delivery_id in ("a", "b", "c", "c", "b", "a"):
        wakes.post(delivery_id=delivery_id)
    assert wakes.count == 4


@pytest.mark.parametrize("signing", [{"secret": b"somebody else's secret"}, {"age_s": 400}])
def test_a_bad_signature_is_answered_401_and_wakes_nobody(wakes: Wakes, signing) -> None:
    assert wakes.post(**signing).status_code == 401
    assert wakes.count == 0


def test_an_id_that_was_refused_is_not_remembered(wakes: Wakes) -> None:
    wakes.post(secret=b"somebody else's secret")
    wakes.post()
    assert wakes.count == 1


@pytest.mark.parametrize(
    ("request_line", "more", "status"),
    [
        (b"POST /wake HTTP/1.1", b"", 411),
        (b"POST /wake HTTP/1.1", b"Content-Length: -1\r\n", 411),
        (b"POST /wake HTTP/1.1", b"Transfer-Encoding: chunked\r\n", 411),
        (b"POST /wake HTTP/1.1", b"Content-Length: 65537\r\n", 413),
        (b"POST /wake HTTP/1.1", b"Content-Length: 0\r\n", 401),
        (b"POST /else HTTP/1.1", b"Content-Length: 0\r\n", 404),
        (b"POST /wake?now HTTP/1.1", b"Content-Length: 0\r\n", 404),
        (b"GET /wake HTTP/1.1", b"", 405),
        (b"GET /metrics HTTP/1.1", b"", 404),
        (b"DELETE /wake HTTP/1.1", b"", 405),
        (b"nonsense", b"", 400),
        (b"POST /wake HTTP/9.9", b"", 505),
        (b"POST /" + b"a" * 70_000 + b" HTTP/1.1", b"", 414),
    ],
)
def test_what_is_no_wake_is_answered_by_its_status_alone(
    wakes: Wakes, request_line: bytes, more: bytes, status: int
) -> None:
    answer = wakes.raw(request_line + b"\r\n" + more + b"\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == str(status).encode()
    assert body == b""
    assert wakes.count == 0


def test_a_callers_words_reach_neither_stderr_nor_the_log_unescaped(
    wakes: Wakes, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wakes.raw(b"GET /wake\x1b[31m\rforged HTTP/1.1\r\n\r\n")
    wakes.raw(b"POST /wake HTTP/1.1\r\nContent-Length: 0\r\nwebhook-id: a\rb\x1b\r\n\r\n")
    wakes.post(delivery_id="a\x7fb")
    assert capfd.readouterr().err == ""
    assert {record.levelno for record in caplog.records if "webhooks" in record.name} == {
        logging.DEBUG
    }
    assert not any(set(record.getMessage()) & set("\r\n\x1b\x7f") for record in caplog.records)


def test_a_client_that_says_nothing_is_let_go(
    wakes: Wakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks._Handler, "timeout", 0.01)
    assert wakes.raw(b"") == b""


def test_a_client_that_never_ends_is_let_go(wakes: Wakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "CONNECTION_S", 0.0)
    assert wakes.raw(b"POST /wake HTTP/1.1\r\nContent-Le") == b""


def test_connections_over_the_limit_are_closed_and_room_is_made_again(wakes: Wakes) -> None:
    held = [wakes.connect() for _ in range(webhooks.CONNECTIONS)]
    try:
        assert wakes.raw(b"") == b""
        held[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
        answer = b"".join(iter(lambda: held[0].recv(4096), b""))  # to the end: its room is free
        assert b"404" in answer
        assert wakes.post().status_code == 204
    finally:
        for connection in held:
            connection.close()


def test_a_port_that_is_taken_is_named(wakes: Wakes) -> None:
    with pytest.raises(UsageError, match=str(wakes.receiver.port)):
        Receiver("127.0.0.1", wakes.receiver.port, SECRET, wakes.wake)


def test_a_receiver_that_never_started_can_be_closed() -> None:
    Receiver("127.0.0.1", 0, SECRET, lambda: None).close()
