"""A real service that sends its spans to a collector, and writes an access log."""

import http.client
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import WAIT_TIMEOUT_S, wait_for
from tests.e2e.processes import Service
from tests.otlp_receiver import Collector, attributes, running_collector

pytestmark = pytest.mark.e2e
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"  # pragma: allowlist secret


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running_collector() as collector:
        yield collector


def traced_service(paths: Path, collector: Collector) -> Service:
    """A service that sends spans only when it ends, so that the end must send them."""
    service = Service(
        paths,
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint,
        OTEL_BSP_SCHEDULE_DELAY="3600000",
        CONVOY_ACCESS_LOG="on",
    )
    try:
        wait_for(service.is_ready, "the service did not become ready")
    except BaseException:
        service.stop()
        raise
    return service


def classify(service: Service, body: bytes, **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=WAIT_TIMEOUT_S)
    try:
        connection.request("POST", "/v1/classify", body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def lines(service: Service) -> list[dict[str, Any]]:
    """The lines of the access log."""
    found = [each for each in service.log.read_text().splitlines() if each.startswith("{")]
    parsed = [json.loads(each) for each in found]
    return [each for each in parsed if each["event"] == "request"]


def test_a_service_that_ends_has_sent_all_spans_and_written_all_lines(
    paths: Path, collector: Collector, png: bytes
) -> None:
    service = traced_service(paths, collector)
    try:
        sent = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
        unsampled = {"traceparent": f"00-{'1' * 32}-00f067aa0ba902b7-00"}
        assert classify(service, png, **sent) == 200
        assert classify(service, png, **unsampled) == 200
        for number in range(20):
            assert classify(service, png, **{"X-Request-Id": f"number-{number}"}) == 200
        with socket.create_connection(("127.0.0.1", service.port)) as malformed:
            malformed.sendall(b"POST / HTTP/1.1\r\n\r\n")  # the worker refuses it: no Host
            assert b" 400 " in malformed.recv(1000)
    finally:
        assert service.stop() == 0
    asked = [each for each in collector.servers() if each.name == "POST /v1/classify"]
    ids = {attributes(each.attributes)["convoy.request_id"] for each in asked}
    assert ids == {TRACE, *(f"number-{number}" for number in range(20))}
    (continued,) = [each for each in asked if each.trace_id.hex() == TRACE]
    children = collector.children(continued)
    assert [each.name for each in children] == ["decode", "queue", "forward", "encode"]
    assert not {"GET /readyz", "GET /livez"} & {each.name for each in collector.servers()}
    assert {each["service.name"] for each in collector.resources} == {"convoy"}
    written = [each for each in lines(service) if each.get("path") == "/v1/classify"]
    assert len(written) == 22
    assert {each["client"] for each in written} == {"127.0.0.1"}
    (refused,) = [each for each in lines(service) if each["status"] == 400]
    assert "path" not in refused
    assert not [each for each in lines(service) if each.get("path") == "/readyz"]


def test_a_collector_that_hangs_does_not_keep_a_service_from_ending(
    paths: Path, collector: Collector, png: bytes
) -> None:
    collector.released.clear()
    service = traced_service(paths, collector)
    try:
        for _ in range(5):
            assert classify(service, png) == 200
    finally:
        assert service.stop() == 0
    assert collector.asked.is_set()
    assert "Traceback" not in service.log.read_text()
    assert signal.SIGKILL.name not in service.log.read_text()
