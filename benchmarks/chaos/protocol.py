"""Scenarios 9, 11 and 13: malformed HTTP, the OpenAPI documents, and access control."""

import contextlib
import http.client
import itertools
import os
import re
import socket
import subprocess
import sys
import tempfile
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.chaos.stack import paths_of_two, service, wait_for_port
from benchmarks.common import free_port
from benchmarks.traffic import honest
from registry.auth.tokens import Tokens
from registry.control.api import ROUTES
from registry.core.paths import Paths
from registry.store.mlflow_store import ModelStore

SMUGGLED = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
WAIT_S = 1.0


def payloads() -> Iterator[tuple[str, bytes]]:
    """Requests that two HTTP parsers could read differently, most with a second one hidden."""
    lengths = [b"Content-Length: 0", b"Content-Length: 5", b"Content-Length: %d" % len(SMUGGLED)]
    codings = [
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding:\tchunked",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: identity, chunked",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding: \x0bchunked",
        b"Transfer-Encoding:\r\n chunked",
        b"X: y\nTransfer-Encoding: chunked",
        b"X: y\rTransfer-Encoding: chunked",
        b" Transfer-Encoding: chunked",
        b"Transfer_Encoding: chunked",
        b"transfer-encoding: CHUNKED",
        b'Transfer-Encoding: "chunked"',
        b"Transfer-Encoding: chunked;q=1",
        b"Transfer-Encoding: ",
        b"Transfer\x00-Encoding: chunked",
    ]
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n"
    chunked = b"0\r\n\r\n" + SMUGGLED
    for length, coding in itertools.product(lengths, codings):
        for order in ((length, coding), (coding, length)):
            yield "length and coding", head + b"\r\n".join(order) + b"\r\n\r\n" + chunked
    for coding in codings:
        yield "coding", head + coding + b"\r\n\r\n" + chunked
    chunks = [
        b"5;x=\n\r\nhello\r\n0\r\n\r\n",
        b"5 \r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"+5\r\nhello\r\n0\r\n\r\n",
        b"-1\r\nhello\r\n0\r\n\r\n",
        b"ffffffffffffffff\r\nhello\r\n0\r\n\r\n",
        b"5\nhello\n0\n\n",
        b"5\r\nhelloworld\r\n0\r\n\r\n",
        b"00000000000000000000005\r\nhello\r\n0\r\n\r\n",
        b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"5" + b";a=b" * 5000 + b"\r\nhello\r\n0\r\n\r\n",
    ]
    for chunk in chunks:
        yield "chunk", head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + SMUGGLED
    odd_lengths = [
        b"+5", b"-5", b"5, 5", b"5,6", b"0x5", b"5\x00", b"", b" ", b"5 5", b"1e1", b"\xb25",
        b"99999999999999999999", b"5;", b"0\r\nContent-Length: 5", b"5\r\nContent-Length: 5",
        b"5\nContent-Length: 0", b"00000000000000000005", b"5\x0b", b"'5'",
    ]  # fmt: skip
    for text in odd_lengths:
        yield "length", head + b"Content-Length: " + text + b"\r\n\r\n" + b"hello" + SMUGGLED
    lines = [
        b"POST /v1/classify HTTP/1.9", b"POST /v1/classify HTTP/2.0", b"POST /v1/classify HTTP/0.9",
        b"POST  /v1/classify HTTP/1.1", b"POST\t/v1/classify HTTP/1.1", b"POST /v1/classify",
        b"POST /v1/classify HTTP/1.1 x", b"P\x00ST / HTTP/1.1", b" POST / HTTP/1.1",
        b"PRI * HTTP/2.0", b"GET http://other/livez HTTP/1.1", b"CONNECT other:80 HTTP/1.1",
        b"GET //other/livez HTTP/1.1", b"GET /../../etc/passwd HTTP/1.1", b"GET /%00 HTTP/1.1",
        b"GET /v1/models/%2e%2e/x HTTP/1.1", b"GET / HTTP/1.1\rX: y", b"G" * 5000 + b" / HTTP/1.1",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1", b"get / HTTP/1.1", b"\x16\x03\x01\x02\x00\x01\x00",
    ]  # fmt: skip
    for line in lines:
        yield "request line", line + b"\r\nHost: x\r\nContent-Length: +1\r\n\r\n" + SMUGGLED
    for nasty in (b"\r\n\r\n", b"\r\n" * 50, b"\x00\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        yield "no request", nasty
    for expectation in (b"100-Continue", b"100-CONTINUE", b"100-continue, x", b"200-ok"):
        yield "expect", head + b"Content-Length: 5, 5\r\nExpect: " + expectation + b"\r\n\r\nhello"
    headers = [
        b"", b"Host: x\r\nHost: y", b"Host: x\r\n folded: y", b"Host: x\r\nNo colon", b": empty",
        b"Host: x\r\nBad Name: y", b"Host: x\r\nX: \x00", b"Host: x\r\nX: a\rb", b"Host : x",
        b"Host: x\r\n" + b"X: y\r\n" * 500 + b"Z: z", b"Host: x\r\nX: " + b"y" * 60_000,
        b"Host: x\r\nConnection: close, keep-alive\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk",
        b"Host: x\r\nExpect: 200-ok", b"Host: x\r\nX-Request-Id: a\x0b\r\nContent-Length: x",
    ]  # fmt: skip
    for each in headers:
        start = b"POST /v1/classify HTTP/1.1\r\n" + each
        yield "headers", start + b"\r\nContent-Length: 5, 5\r\n\r\nhello" + SMUGGLED


def malformed_http(repeat: int = 1) -> tuple[dict[str, Any], None]:
    """Smuggled and malformed HTTP requests, sent by raw socket directly to the service."""
    outcomes: Counter[str] = Counter()
    problems = []
    with paths_of_two() as (paths, image), service(paths) as running:
        workers = [worker.pid for worker in running.workers()]
        sent = 0
        for kind, payload in itertools.chain.from_iterable(payloads() for _ in range(repeat)):
            statuses = exchange(running.port, payload)
            sent += 1
            outcomes[f"{statuses or 'closed'}"] += 1
            if len(statuses) > 1 or any(status >= 500 for status in statuses):
                problems.append((kind, payload[:200], statuses))
        honest(running.port, image)  # proves that the service still answers
        survived = workers == [worker.pid for worker in running.workers()]
    return {
        "payloads": sent,
        "second_answers": sum(len(statuses) > 1 for _, _, statuses in problems),
        "server_errors": sum(any(s >= 500 for s in statuses) for _, _, statuses in problems),
        "workers_survived": survived,
        "answers": dict(outcomes),
        "problems": [f"{kind}: {payload!r} {statuses}" for kind, payload, statuses in problems],
    }, None


def exchange(port: int, payload: bytes) -> list[int]:
    """Every status that comes back for ``payload`` within a second."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(payload)
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while data := sock.recv(65_536):
                answer += data
    found = re.findall(rb"HTTP/1\.[01] (\d{3})", answer)
    return [int(status) for status in found if status != b"100"]


def described_api(examples: int = 200) -> tuple[dict[str, Any], None]:
    """schemathesis on both OpenAPI documents: no server error and no undocumented status."""
    figures: dict[str, Any] = {}
    with paths_of_two() as (paths, _), service(paths, pull=True) as running:
        figures |= _schemathesis("service", running.port, {}, examples)
        address = f"http://127.0.0.1:{running.port}"
        with control_plane(paths, CONVOY_SERVICE_URL=address) as (port, texts):
            bearer = {"Authorization": f"Bearer {texts['admin']}"}
            figures |= _schemathesis("control", port, bearer, examples)
    return figures, None


def _schemathesis(name: str, port: int, headers: dict[str, str], examples: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="convoy-schemathesis-") as folder:
        # Name a model that exists, so that requests get further than the look-up of the model.
        Path(folder, "schemathesis.toml").write_text('[parameters]\n"path.name" = "digits"\n')
        command = [sys.executable, "-m", "schemathesis.cli", "run"]
        command += [f"http://127.0.0.1:{port}/openapi.json", f"--max-examples={examples}"]
        command += ["--checks=not_a_server_error,status_code_conformance", "--seed=0"]
        command += ["--no-color", "--workers=2", "--report=har", f"--report-dir={folder}"]
        for key, value in headers.items():
            command += ["--header", f"{key}: {value}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=folder)
    print(done.stdout[-3000:], done.stderr[-1000:], file=sys.stderr)
    counts = re.search(r"(\d[\d,]*) generated", done.stdout)
    return {
        f"{name}_exit_status": done.returncode,
        f"{name}_requests": counts[1] if counts else None,
        f"{name}_server_errors": done.stdout.count("Server error"),
        f"{name}_undocumented_codes": done.stdout.count("Undocumented HTTP status code"),
    }


@contextmanager
def control_plane(paths: Paths, **more: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Start a control plane; gives its port, and a token of each role."""
    tokens = Tokens(paths.tokens)
    texts = {role: tokens.add(role, role) for role in ("classify", "viewer", "admin")}
    port = free_port()
    environment = {**os.environ, "CONVOY_HOME": str(paths.root), **more}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "registry", "control", "--port", str(port)]
    with Path(paths.root / "control.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for_port(port, 60)
        yield port, texts
    finally:
        process.terminate()
        process.wait(30)


def access_control(repeat: int = 1) -> tuple[dict[str, Any], None]:
    """Requests to every route of the control plane with no or a wrong token, or cross-origin."""
    opened = []
    tried: Counter[str] = Counter()
    open_to_all = {"/livez", "/openapi.json"}
    with paths_of_two() as (paths, _), control_plane(paths) as (port, texts):
        cookie, csrf = _sign_in(port, texts["admin"])
        decisions = len(ModelStore(paths).audit_logs.read("digits").lines)
        if _status(port, "GET", "/models/digits", {"Cookie": cookie}, b"") != 200:
            raise SystemExit("could not sign in: every later attempt would be refused for that")
        attempts_of_all = {
            "no token": {},
            "wrong token": {"Authorization": "Bearer convoy_wrong"},
            "basic": {"Authorization": "Basic YWRtaW46YWRtaW4="},
            "role classify": {"Authorization": f"Bearer {texts['classify']}"},
        }
        for rule, method, _ in ROUTES * repeat:
            if rule in open_to_all:
                continue
            path = rule.replace("<name>", "digits").replace("<int:version>", "2")
            attempts = dict(attempts_of_all)
            if method == "POST":
                attempts["role viewer"] = {"Authorization": f"Bearer {texts['viewer']}"}
                attempts["a session alone"] = {"Cookie": cookie}
                attempts["a session, cross-origin"] = {
                    "Cookie": cookie, "Origin": "http://evil", "Sec-Fetch-Site": "cross-site",
                }  # fmt: skip
            for name, headers in attempts.items():
                status = _status(port, method, path, headers, b"{}")
                tried[name] += 1
                if status not in (401, 403):
                    opened.append(f"{name}: {method} {path} → {status}")
        path = "/models/digits/decide"
        for action in ("promote", "roll-back", "start-canary", "stop-canary"):
            form = {"action": action, "version": "2", "reason": "x", "confirmed": "yes"}
            for name, extra, headers in (
                ("form without csrf", {}, {"Cookie": cookie}),
                ("form, wrong csrf", {"csrf": "x" * len(csrf)}, {"Cookie": cookie}),
                ("form without session", {"csrf": csrf}, {}),
            ):
                body = urllib.parse.urlencode(form | extra).encode()
                kind = {"Content-Type": "application/x-www-form-urlencoded"}
                status, location = _answer(port, "POST", path, headers | kind, body)
                tried[name] += 1
                # An accepted decision also redirects, but to the model's page.
                sent_to_login = 300 <= status < 400 and location.startswith("../../login")
                if status not in (400, 401, 403, 404, 405) and not sent_to_login:
                    opened.append(f"{name}: {path} → {status} {location}")
        decided = len(ModelStore(paths).audit_logs.read("digits").lines) - decisions
    return {"attempts": sum(tried.values()), **tried, "opened": opened, "decided": decided}, None


def _status(port: int, method: str, path: str, headers: dict[str, str], body: bytes) -> int:
    return _answer(port, method, path, headers, body)[0]


def _answer(
    port: int, method: str, path: str, headers: dict[str, str], body: bytes
) -> tuple[int, str]:
    """The status, and the target of a redirect."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body if method == "POST" else None, headers)
        response = connection.getresponse()
        return response.status, response.getheader("Location") or ""
    finally:
        connection.close()


def _sign_in(port: int, token: str) -> tuple[str, str]:
    """Sign in; returns the session's cookie and its CSRF token."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/login")
    answer = connection.getresponse()
    page = answer.read().decode()
    first = (answer.getheader("Set-Cookie") or "").partition(";")[0]
    csrf = re.search(r'name="?csrf"? value="?([^">]+)', page)
    form = {"token": token} | ({"csrf": csrf[1]} if csrf else {})
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Cookie": first}
    connection.request("POST", "/login", urllib.parse.urlencode(form), headers)
    answer = connection.getresponse()
    answer.read()
    cookie = (answer.getheader("Set-Cookie") or first).partition(";")[0]
    connection.close()
    return cookie, csrf[1] if csrf else "x" * 32
