"""Traces, received by the tests' own collector, and the access log."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import msgspec
import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

from registry.auth.tokens import Tokens
from registry.core.errors import Overloaded, UsageError
from registry.model.bundle import Bundle
from service import create_app
from service.access.auth import AccessControl
from service.http.recording import RouteTemplates
from service.loading.model_slot import ModelSlot
from service.observability.access_log import AccessLog, line_of
from service.observability.background_queue import CHUNK, BackgroundQueue
from service.observability.metrics import Metrics
from service.observability.request_record import FinishedRequest, RequestRecord
from service.observability.request_recorder import RequestRecorder
from service.observability.tracing import span_export
from service.observability.tracing.options import SAMPLERS, TracingOptions
from service.observability.tracing.process import receiver_at
from service.observability.tracing.trace_context import (
    Sampling,
    TraceContext,
    parse_traceparent,
)
from service.observability.tracing.tracer import BUFFER_BYTES, SpanFeed
from service.protocols.v1 import V1
from service.settings import Settings
from service.state import State
from tests.conftest import wait_for
from tests.otlp_receiver import Collector, attributes, running_collector
from tests.service.spans_process import spans_process
from tests.service.test_classify import RAW, parts

ROOT = Path(__file__).parents[2]
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"  # pragma: allowlist secret
PARENT = "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with running_collector() as collector:
        yield collector


def recorder_of(app: Flask) -> RequestRecorder:
    state: State = app.extensions["convoy"]
    assert state.recorder is not None
    return state.recorder


class Traced:
    """Makes clients of apps whose spans go to ``collector``, each by a process of its own."""

    def __init__(
        self, slot: ModelSlot, settings: Settings, metrics: Metrics, collector: Collector
    ) -> None:
        self._slot = slot
        self._settings = settings
        self._metrics = metrics
        self._collector = collector
        self._stack = ExitStack()

    def __call__(self, *, changes: dict[str, Any] | None = None, **variables: str) -> FlaskClient:
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": self._collector.endpoint, **variables}
        options = TracingOptions.from_environment(variables)
        assert options is not None
        folder = Path(self._stack.enter_context(TemporaryDirectory()))
        changed = replace(
            self._settings, **{"tracing": options, "run_folder": folder, **(changes or {})}
        )
        dropped = self._metrics.families.traces_dropped.inc
        self._stack.enter_context(spans_process(folder / "spans", options, dropped))
        app = create_app(changed, {"digits": self._slot}, self._metrics)
        app.testing = False
        self._stack.callback(lambda: recorder_of(app).close(60))
        return app.test_client()

    def end(self) -> None:
        """End the apps, and then the processes; all spans have come afterwards."""
        self._stack.close()


@pytest.fixture
def traced(
    slot: ModelSlot,
    settings: Settings,
    metrics: Metrics,
    deploy: Callable[..., Bundle],
    collector: Collector,
) -> Iterator[Traced]:
    """Makes clients of apps that serve version 1, and send their spans to ``collector``."""
    deploy(1)
    assert slot.refresh()
    traced = Traced(slot, settings, metrics, collector)
    yield traced
    collector.released.set()
    traced.end()


def the_server(collector: Collector) -> Span:
    """The span of the only request."""
    wait_for(collector.servers, "no span came")
    (server,) = collector.servers()
    return server


def test_a_request_has_a_server_span_with_its_stages_below(
    traced: Traced, collector: Collector, png: bytes
) -> None:
    before_ns = time.time_ns()
    response = traced().post("/v1/classify", data=png, **RAW)
    after_ns = time.time_ns()
    server = the_server(collector)
    assert collector.paths == {"/v1/traces"}
    assert server.name == "POST /v1/classify"
    assert server.parent_span_id == b""
    assert server.trace_id.hex() == response.headers["X-Request-Id"]
    assert server.status.code == Status.STATUS_CODE_UNSET
    assert attributes(server.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/classify",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "server.address": "localhost",
        "server.port": 80,
        "convoy.request_id": response.headers["X-Request-Id"],
        "convoy.protocol": "v1",
        "convoy.model.name": "digits",
        "convoy.model.version": "1",
        "convoy.plan": "torch-eager",
        "convoy.images": 1,
        "convoy.batch_size": 1,
    }
    children = collector.children(server)
    assert [each.name for each in children] == ["decode", "queue", "forward", "encode"]
    assert {each.trace_id for each in children} == {server.trace_id}
    assert {each.kind for each in children} == {Span.SPAN_KIND_INTERNAL}
    assert len({each.span_id for each in (server, *children)}) == 5
    times = [server.start_time_unix_nano]
    for each in children:
        times += [each.start_time_unix_nano, each.end_time_unix_nano]
    times.append(server.end_time_unix_nano)
    assert times == sorted(times)
    slack_ns = 50_000_000  # the two clocks of the machine are read one after the other
    assert before_ns - slack_ns <= times[0]
    assert times[-1] <= after_ns + slack_ns


def test_the_resource_is_named_by_the_environment(
    traced: Traced, collector: Collector, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced().post("/v1/classify", data=png, **RAW)
    traced.end()
    assert collector.resources[0]["service.name"] == "convoy"
    collector.resources.clear()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "shop")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    traced().post("/v1/classify", data=png, **RAW)
    traced.end()
    found = collector.resources[0]
    assert (found["service.name"], found["deployment.environment.name"]) == ("shop", "test")


def test_a_list_of_images_has_one_span_of_each_stage(
    traced: Traced, collector: Collector, png: bytes
) -> None:
    response = traced().post("/v1/classify", **parts(png, b"no picture", png))
    assert response.status_code == 200
    server = the_server(collector)
    assert attributes(server.attributes)["convoy.images"] == 2
    assert [each.name for each in collector.children(server)] == [
        *("decode", "queue", "forward", "encode")
    ]


def test_a_callers_trace_is_continued(traced: Traced, collector: Collector, png: bytes) -> None:
    headers = {"traceparent": SAMPLED, "tracestate": "vendor=value,other=1"}
    traced().post("/v1/classify", data=png, headers=headers, **RAW)
    server = the_server(collector)
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE, PARENT)
    assert server.trace_state == "vendor=value,other=1"
    assert {each.trace_state for each in collector.children(server)} == {server.trace_state}


def test_a_request_whose_caller_did_not_sample_has_no_span(
    traced: Traced, collector: Collector, png: bytes
) -> None:
    client = traced()
    client.post("/v1/classify", data=png, headers={"traceparent": UNSAMPLED}, **RAW)
    client.post("/v1/classify", data=png, headers={"X-Request-Id": "the-last"}, **RAW)
    last = the_server(collector)
    assert attributes(last.attributes)["convoy.request_id"] == "the-last"
    assert last.trace_id.hex() != TRACE


def test_probes_metrics_files_and_options_have_no_span(
    traced: Traced, collector: Collector, png: bytes
) -> None:
    client = traced(changes={"health_route": "/own-health", "cors_origins": "https://a.example"})
    probes = ("/livez", "/readyz", "/healthz", "/ping", "/health", "/own-health")
    openinference = ("/v2/health/live", "/v2/health/ready", "/v2/models/digits/ready")
    for path in (*probes, *openinference, "/metrics", "/static/style.css"):
        with client.get(path) as response:
            assert response.status_code == 200, path
    client.options("/v1/models")
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/classify", headers=preflight).status_code == 204
    client.get("/v1/models/digits")
    server = the_server(collector)
    assert server.name == "GET /v1/models/<name>"
    assert collector.children(server) == []


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/models/digits/versions/1/classify", "/v1/models/{name}/versions/{version}/classify"),
        (
            "/v1/models/digits/aliases/champion/classify/",
            "/v1/models/{name}/aliases/{alias}/classify",
        ),
        ("/invocations", "/invocations"),
        ("/endpoints/digits/invocations", "/endpoints/{name}/invocations"),
        ("/predictions/digits", "/predictions/{name}"),
        ("/vertex", "/vertex"),
    ],
)
def test_the_route_is_a_template_without_text_of_the_client(
    traced: Traced, collector: Collector, png: bytes, path: str, route: str
) -> None:
    client = traced(changes={"predict_route": "/vertex"})
    assert client.post(path, data=png, **RAW).status_code == 200
    server = the_server(collector)
    assert server.name == f"POST {route}"
    assert attributes(server.attributes)["http.route"] == route


def test_a_path_or_method_that_a_client_invented_is_not_in_its_span(
    traced: Traced, collector: Collector
) -> None:
    client = traced()
    client.get("/invented")
    client.open("/v1/classify", method="INVENTED")
    client.post("/v1/models/invented/classify", data=b"x", **RAW)
    wait_for(lambda: len(collector.servers()) == 3)
    names = [each.name for each in collector.servers()]
    assert names == ["GET", "HTTP /v1/classify", "POST /v1/models/{name}/classify"]
    assert "invented" not in str(collector.spans).lower()
    found = [attributes(each.attributes) for each in collector.servers()]
    assert [each["http.response.status_code"] for each in found] == [404, 405, 404]
    assert {each.status.code for each in collector.servers()} == {Status.STATUS_CODE_UNSET}


def test_a_refusal_has_a_server_span_alone_and_only_5xx_is_an_error(
    traced: Traced, collector: Collector, slot: ModelSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = traced()
    assert client.post("/v1/classify", data=b"no picture", **RAW).status_code == 415

    def is_full(*arguments: Any) -> None:
        raise Overloaded("full")

    monkeypatch.setattr(slot.require().champion.batcher, "check_room", is_full)
    assert client.post("/v1/classify", data=b"any", **RAW).status_code == 503
    wait_for(lambda: len(collector.servers()) == 2)
    refused, overloaded = collector.servers()
    assert len(collector.spans) == 2
    assert refused.status.code == Status.STATUS_CODE_UNSET
    assert overloaded.status.code == Status.STATUS_CODE_ERROR
    found = attributes(overloaded.attributes)
    assert (found["error.type"], found["convoy.model.version"]) == ("Overloaded", "1")
    assert "error.type" not in attributes(refused.attributes)


@pytest.mark.parametrize("fails", ["hangs", "refuses", "is down"])
def test_a_collector_that_fails_loses_spans_and_no_answer(
    fails: str,
    traced: Traced,
    collector: Collector,
    metrics: Metrics,
    png: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    endpoint: dict[str, Any] = {}
    if fails == "is down":
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    elif fails == "hangs":
        collector.released.clear()
    else:
        collector.status = 400
    client = traced(OTEL_BSP_MAX_QUEUE_SIZE="20", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="10", **endpoint)
    recorder = recorder_of(client.application)
    assert recorder.tracer is not None
    for _ in range(60):
        assert client.post("/v1/classify", data=png, **RAW).status_code == 200
        assert len(recorder.tracer.queue) <= 20

    def dropped() -> float:
        return float(metrics.families.traces_dropped._value.get())

    wait_for(lambda: dropped() > 3)
    recorder.close(0.5)
    lines = [each for each in caplog.records if "cannot send spans" in each.getMessage()]
    assert len(lines) <= 1
    assert not [each for each in caplog.records if each.name.startswith("opentelemetry")]


def test_closing_sends_the_spans_that_wait(
    traced: Traced, collector: Collector, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    client = traced()
    for _ in range(3):
        client.post("/v1/classify", data=png, **RAW)
    traced.end()
    assert len(collector.servers()) == 3


def test_a_share_of_new_traces_is_sampled_as_the_sdk_samples_them() -> None:
    sampler = TraceIdRatioBased(0.25)
    sampling = Sampling(TracingOptions(endpoint="http://x", share=0.25, follows_caller=False))
    made = Sampling(TracingOptions(endpoint="http://x"))
    for _ in range(300):
        context = made.context("", "", None)
        assert context is not None
        expected = sampler.should_sample(None, int(context.trace_id, 16), "").decision
        is_sampled = sampling.context("", "", context.trace_id) is not None
        assert is_sampled == (expected is Decision.RECORD_AND_SAMPLE)


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_decides_as_opentelemetry_defines_it(name: str) -> None:
    variables = {**ENDPOINT, "OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": "0"}
    options = TracingOptions.from_environment(variables)
    assert options is not None
    sampling = Sampling(options)
    found = [sampling.context(header, "", None) for header in ("", SAMPLED, UNSAMPLED)]
    is_on = name.endswith("always_on")
    follows = name.startswith("parentbased")
    assert [each is not None for each in found] == [
        is_on,
        True if follows else is_on,
        False if follows else is_on,
    ]


def test_without_the_propagator_tracecontext_each_request_is_a_trace_of_its_own() -> None:
    options = TracingOptions.from_environment({**ENDPOINT, "OTEL_PROPAGATORS": "b3"})
    assert options is not None
    context = Sampling(options).context(UNSAMPLED, "", None)
    assert context is not None
    assert context.trace_id != TRACE
    assert context.parent_id == ""


@pytest.mark.parametrize(
    "header",
    [
        "",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"01-{TRACE}-{PARENT}-01more",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"{SAMPLED},{SAMPLED}",
    ],
)
def test_a_malformed_traceparent_is_ignored(header: str) -> None:
    assert parse_traceparent(header) is None


def test_a_traceparent_of_a_later_version_is_read() -> None:
    assert parse_traceparent(f"01-{TRACE}-{PARENT}-03-more") == (TRACE, PARENT, True)


@pytest.mark.parametrize(
    "state", ["no member", "a=1,a=2", "a=" + "x" * 600, ",".join(f"k{n}=1" for n in range(40))]
)
def test_a_malformed_tracestate_does_not_prevent_the_span(
    traced: Traced, collector: Collector, png: bytes, state: str
) -> None:
    headers = {"traceparent": SAMPLED, "tracestate": state}
    traced().post("/v1/classify", data=png, headers=headers, **RAW)
    assert the_server(collector).trace_id.hex() == TRACE
    assert not logging.getLogger("opentelemetry.trace.span").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "http://HOST:PORT"),
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf"),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "zipkin"}, "otlp or none"),
        ({**ENDPOINT, "OTEL_TRACES_SAMPLER": "jaeger_remote"}, "parentbased_traceidratio"),
        (
            {
                **ENDPOINT,
                "OTEL_TRACES_SAMPLER": "traceidratio",
                "OTEL_TRACES_SAMPLER_ARG": "2",
            },
            "from 0 to 1",
        ),
        ({**ENDPOINT, "OTEL_BSP_MAX_QUEUE_SIZE": "0"}, "whole number"),
        ({**ENDPOINT, "OTEL_BSP_MAX_QUEUE_SIZE": "100"}, "is more than"),
    ],
)
def test_a_variable_that_cannot_be_used_stops_the_start(
    variables: dict[str, str], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        Settings.from_environment(variables)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {**ENDPOINT, "OTEL_SDK_DISABLED": "true"},
        {**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_tracing_is_off_unless_it_is_asked_for(variables: dict[str, str]) -> None:
    assert Settings.from_environment(variables).tracing is None


def test_the_endpoint_of_traces_is_taken_as_it_is_and_the_general_one_gets_a_path() -> None:
    general = TracingOptions.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318/"})
    own = {**ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://b/otlp"}
    traces = TracingOptions.from_environment(own)
    assert general is not None
    assert traces is not None
    assert (general.endpoint, traces.endpoint) == ("http://a:4318/v1/traces", "https://b/otlp")


def in_a_fresh_process(code: str, **variables: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **variables},
        check=True,
    ).stdout.strip()


def test_a_service_without_an_endpoint_does_not_import_opentelemetry() -> None:
    code = (
        "import sys; from service import create_app; app = create_app(); "
        "print('opentelemetry' in sys.modules, app.extensions['convoy'].recorder)"
    )
    assert in_a_fresh_process(code) == "False None"


def test_an_endpoint_without_the_packages_stops_the_start_and_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.exporter'] = None\n"
        "from service.__main__ import main\n"
        "sys.stderr = sys.stdout\n"
        "print(main(['serve']))"
    )
    printed = in_a_fresh_process(code, **ENDPOINT)
    assert "pip install 'convoy[tracing]'" in printed
    assert printed.endswith("2")


# The process that makes the spans


def start_process(address: Path, endpoint: str, **variables: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "service.observability.tracing.process", str(address)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **variables},
    )


def test_records_reach_the_collector_through_the_process_even_if_it_starts_late(
    traced: Traced, collector: Collector, png: bytes, tmp_path: Path
) -> None:
    address = tmp_path / "spans"
    client = traced(changes={"run_folder": tmp_path})
    for _ in range(3):
        client.post("/v1/classify", data=png, **RAW)
    process = start_process(address, collector.endpoint)
    wait_for(address.exists)
    for _ in range(3):
        client.post("/v1/classify", data=png, headers={"traceparent": SAMPLED}, **RAW)
    recorder_of(client.application).close(60)
    assert process.stdin is not None
    process.terminate()  # the supervisor sends that, too; workers may still send records
    process.stdin.close()
    assert process.wait(60) == 0
    continued = [each for each in collector.servers() if each.trace_id.hex() == TRACE]
    assert len(continued) == 3
    assert all(len(collector.children(each)) == 4 for each in continued)
    assert process.stderr is not None
    with process.stderr:
        assert b"Traceback" not in process.stderr.read()


def test_the_process_ends_while_records_wait_for_a_collector_that_hangs(
    traced: Traced, collector: Collector, png: bytes, tmp_path: Path
) -> None:
    collector.released.clear()
    client = traced(changes={"run_folder": tmp_path})
    variables = {"OTEL_BSP_MAX_QUEUE_SIZE": "10", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "5"}
    process = start_process(
        tmp_path / "spans", collector.endpoint, OTEL_EXPORTER_OTLP_TIMEOUT="3600", **variables
    )
    with process:
        wait_for((tmp_path / "spans").exists)
        for _ in range(20):  # 100 spans: more than the process may hold
            assert client.post("/v1/classify", data=png, **RAW).status_code == 200
        recorder_of(client.application).close(60)
        wait_for(collector.asked.is_set)
        assert process.stdin is not None
        process.stdin.close()
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_sixteen_requests_with_the_longest_texts_fit_into_a_datagram(
    slot: ModelSlot, settings: Settings, metrics: Metrics, tmp_path: Path
) -> None:
    options = TracingOptions(endpoint="http://127.0.0.1:9")
    changed = replace(settings, tracing=options, run_folder=tmp_path)
    records: list[RequestRecord] = []
    lost: list[int] = []
    decode = msgspec.msgpack.Decoder(list[RequestRecord]).decode
    with receiver_at(tmp_path / "spans") as receiver:
        receiver.settimeout(60)
        app = create_app(changed, {"digits": slot}, metrics)
        headers = {"traceparent": SAMPLED, "tracestate": "a=" + "x" * 30_000}
        for _ in range(CHUNK):
            path = f"/v1/models/{'ö' * 15_000}/classify"
            assert app.test_client().post(path, headers=headers).status_code == 404
            records += decode(receiver.recv(BUFFER_BYTES))
        feed = SpanFeed(tmp_path / "spans", lost.append)
        feed.send(records)
        assert decode(receiver.recv(BUFFER_BYTES)) == records
        feed.close()
    recorder_of(app).close(60)
    assert len(records) == CHUNK
    assert not lost


def test_records_are_dropped_and_counted_while_the_process_does_not_run(
    traced: Traced, metrics: Metrics, png: bytes, tmp_path: Path
) -> None:
    client = traced(changes={"run_folder": tmp_path / "no process"})
    for _ in range(3):
        assert client.post("/v1/classify", data=png, **RAW).status_code == 200
    recorder_of(client.application).close(0.2)
    wait_for(lambda: float(metrics.families.traces_dropped._value.get()) == 3)


def test_a_worker_with_traces_does_not_import_the_sdk(tmp_path: Path) -> None:
    code = (
        "import sys; from service import create_app; app = create_app(); "
        "print('opentelemetry.sdk.trace' in sys.modules, app.extensions['convoy'].recorder is None)"
    )
    printed = in_a_fresh_process(code, **ENDPOINT, CONVOY_RUN_FOLDER=str(tmp_path))
    assert printed == "False False"


# The queue


def test_a_full_queue_drops_rows_and_counts_them() -> None:
    lost: list[int] = []
    seen: list[int] = []
    begun, released = Event(), Event()

    def handle(rows: list[int]) -> None:
        begun.set()
        released.wait(60)
        seen.extend(rows)

    queue: BackgroundQueue[int] = BackgroundQueue("test", handle, 10, lost.append)
    queue.put(0)
    assert begun.wait(60)
    for row in range(1, 16):
        queue.put(row)
    assert len(queue) == 10
    released.set()
    queue.close(60)
    assert seen == list(range(11))
    assert sum(lost) == 5


def test_a_row_that_cannot_be_handled_does_not_end_the_thread(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lost: list[int] = []
    seen: list[int] = []

    def handle(rows: list[int]) -> None:
        if 0 in rows:
            raise ValueError("zero")
        seen.extend(rows)

    queue: BackgroundQueue[int] = BackgroundQueue("test", handle, 10, lost.append)
    queue.put(0)
    wait_for(lambda: lost)
    queue.put(1)
    queue.close(60)
    assert (lost, seen) == ([1], [1])
    assert len([each for each in caplog.records if each.levelno >= logging.ERROR]) == 1


# The access log


class Written:
    """The lines that an app's access log has written."""

    def __init__(self, app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
        self.app = app
        self.data = b""
        log = recorder_of(app).access_log
        assert log is not None
        monkeypatch.setattr(log, "_write", self._append)

    def _append(self, data: bytes) -> None:
        self.data += data

    def lines(self) -> list[dict[str, Any]]:
        """All lines; no further request may come."""
        recorder_of(self.app).close(60)
        return [json.loads(line) for line in self.data.splitlines()]


@pytest.fixture
def logged(
    slot: ModelSlot,
    settings: Settings,
    metrics: Metrics,
    deploy: Callable[..., Bundle],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[FlaskClient, Written]]:
    deploy(1)
    assert slot.refresh()

    def make(**changes: Any) -> tuple[FlaskClient, Written]:
        changed = replace(settings, access_log="on", **changes)
        app = create_app(changed, {"digits": slot}, metrics)
        app.testing = False
        return app.test_client(), Written(app, monkeypatch)

    return make


def test_a_length_of_thousands_of_digits_is_400_and_has_a_line(
    logged: Callable[..., tuple[FlaskClient, Written]], png: bytes
) -> None:
    client, written = logged()
    lengths = {"CONTENT_LENGTH": "9" * 5000}
    response = client.post("/v1/classify", data=png, environ_overrides=lengths, **RAW)
    assert response.status_code == 400
    (line,) = written.lines()
    assert (line["status"], line["request_bytes"]) == (400, 0)


def test_each_request_but_a_probe_has_a_line(
    logged: Callable[..., tuple[FlaskClient, Written]], png: bytes
) -> None:
    client, written = logged(trusted_proxies="127.0.0.0/8")
    headers = {"traceparent": UNSAMPLED, "X-Forwarded-For": "spoofed, 192.0.2.7"}
    response = client.post("/v1/classify?top_k=1", data=png, headers=headers, **RAW)
    client.get("/readyz")
    client.get("/metrics")
    client.post("/v1/models/digits/classify", data=b"no picture", **RAW)
    first, scrape, refused = written.lines()
    assert first.pop("duration_ms") >= 0
    assert first.pop("timestamp").endswith("Z")
    assert first == {
        "event": "request",
        "level": "info",
        "logger": "service.observability.access_log",
        "method": "POST",
        "path": "/v1/classify",
        "status": 200,
        "request_bytes": len(png),
        "response_bytes": len(response.data),
        "model_name": "digits",
        "model_version": 1,
        "protocol": "v1",
        "client": "192.0.2.7",
        "request_id": TRACE,
        "trace_id": TRACE,
    }
    assert (scrape["path"], scrape["status"], scrape["client"]) == ("/metrics", 200, "127.0.0.1")
    assert (refused["status"], refused["model_name"]) == (415, "digits")
    assert refused["response_bytes"] > 0


def test_the_line_has_the_tokens_name_and_never_its_text(
    logged: Callable[..., tuple[FlaskClient, Written]], png: bytes, tmp_path: Path
) -> None:
    text = Tokens(tmp_path / "tokens.json").add("camera-7", "classify")
    client, written = logged(auth="required", tokens=tmp_path / "tokens.json")
    headers = {"Authorization": f"Bearer {text}"}
    assert client.post("/v1/classify", data=png, headers=headers, **RAW).status_code == 200
    wrong = {"Authorization": "Bearer convoy_wrong"}
    assert client.post("/v1/classify", data=png, headers=wrong, **RAW).status_code == 401
    known, unknown = written.lines()
    assert known["token"] == "camera-7"
    assert "token" not in unknown
    assert text not in written.data.decode()
    assert b"convoy_wrong" not in written.data


def test_a_token_is_looked_up_once_for_a_request_and_its_line(
    logged: Callable[..., tuple[FlaskClient, Written]],
    png: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = Tokens(tmp_path / "tokens.json").add("camera-7", "admin")
    client, written = logged(auth="required", tokens=tmp_path / "tokens.json")
    looked_up: list[str] = []
    find = Tokens.find

    def count(tokens: Tokens, text: str) -> Any:
        looked_up.append(text)
        return find(tokens, text)

    monkeypatch.setattr(Tokens, "find", count)
    headers = {"Authorization": f"Bearer {text}"}
    assert client.post("/v1/classify", data=png, headers=headers, **RAW).status_code == 200
    assert client.get("/v1/models", headers=headers).status_code == 200
    assert looked_up == [text, text]
    assert [each["token"] for each in written.lines()] == ["camera-7", "camera-7"]


def test_a_path_is_matched_once_for_all_requests_and_lines(
    logged: Callable[..., tuple[FlaskClient, Written]],
    png: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matched: list[str] = []
    match, find = V1.match, RouteTemplates.find

    def count_match(protocol: V1, path: str) -> Any:
        matched.append("protocol")
        return match(protocol, path)

    def count_find(routes: RouteTemplates, path: str) -> Any:
        matched.append("route")
        return find(routes, path)

    monkeypatch.setattr(V1, "match", count_match)
    monkeypatch.setattr(RouteTemplates, "find", count_find)
    client, written = logged()
    for _ in range(3):
        assert client.post("/v1/classify", data=png, **RAW).status_code == 200
    assert len(written.lines()) == 3
    assert matched == ["protocol", "route"]


def test_an_error_while_a_request_is_recorded_does_not_reach_the_client(
    logged: Callable[..., tuple[FlaskClient, Written]],
    png: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*arguments: object) -> tuple[str, str | None]:
        raise ValueError("no client")

    monkeypatch.setattr(AccessControl, "describe", fail)
    client, written = logged()
    assert client.post("/v1/classify", data=png, **RAW).status_code == 200
    assert client.post("/v1/classify", data=b"no picture", **RAW).status_code == 415
    assert client.get("/v1/models").status_code == 200
    assert written.lines() == []
    (line,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert "cannot record request" in line.getMessage()


def record(path: str) -> RequestRecord:
    return RequestRecord(
        request=FinishedRequest(
            request_id="r",
            name="GET",
            method="GET",
            path=path,
            status=404,
            attributes={},
            started=time.perf_counter(),
        ),
        ended=time.perf_counter(),
        trace=TraceContext(),
        client="127.0.0.1",
        token=None,
        model_name=None,
        model_version=None,
        plan=None,
        answered=None,
    )


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=255), max_size=1_000))
def test_no_path_can_forge_a_line(path: str) -> None:
    data: list[bytes] = []
    log = AccessLog(data.append)
    log._write_lines([record(path), record("/next")])
    log.queue.close(0)
    lines = b"".join(data).splitlines()
    first, second = map(json.loads, lines)
    assert second["path"] == "/next"
    expected = path.encode("latin-1").decode("utf-8", "replace")
    assert expected.startswith(first["path"])
    assert first["path"] or not expected
    assert not any(byte < 32 for byte in lines[0])
    assert all(len(piece) <= 4096 and piece.endswith(b"\n") for piece in data)


def test_a_path_in_utf8_is_readable_in_its_line() -> None:
    path = "/v1/models/größe/classify"
    assert line_of(record(path.encode().decode("latin-1"))).path == path


def test_lines_that_were_lost_are_counted_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    data: list[bytes] = []
    log = AccessLog(data.append)
    log._say_lost(7)
    log.queue.close(0)
    assert json.loads(data[0])["lost"] == 7


def test_concurrent_requests_all_have_a_span_and_a_line(
    traced: Traced, collector: Collector, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = traced(changes={"access_log": "on"})
    written = Written(client.application, monkeypatch)

    def ask(number: int) -> int:
        headers = {"X-Request-Id": f"number-{number}"}
        own = client.application.test_client()
        return own.post("/v1/classify", data=png, headers=headers, **RAW).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(40))) == {200}
    expected = {f"number-{number}" for number in range(40)}
    assert {each["request_id"] for each in written.lines()} == expected
    traced.end()
    assert {
        attributes(each.attributes)["convoy.request_id"] for each in collector.servers()
    } == expected
    traces = {each.trace_id for each in collector.servers()}
    assert len(traces) == 40


def test_the_sdk_logs_at_most_one_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    span_export._log_at_most_once_a_minute()
    for _ in range(5):
        logging.getLogger("opentelemetry.exporter.otlp").warning("failed")
    assert [each.getMessage() for each in caplog.records] == ["cannot send spans: failed"]


def test_an_error_while_lost_rows_are_reported_does_not_end_the_thread() -> None:
    handled: list[int] = []
    full = Event()

    def handle(rows: list[int]) -> None:
        if not full.is_set():
            raise OSError("the disk is full")
        handled.extend(rows)

    def dropped(count: int) -> None:
        if not full.is_set():
            full.set()
            raise OSError("the disk is full")
        handled.append(-count)

    queue = BackgroundQueue("rows", handle, 10, dropped)
    queue.put(1)
    wait_for(full.is_set, "no row was lost")
    queue.put(2)
    queue.close(60)
    assert handled == [2, -1]
