"""The Open Inference Protocol over gRPC, on a real socket."""

import struct
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from flask import Flask
from flask.testing import FlaskClient
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from msgspec.structs import replace

from registry.auth.tokens import Tokens
from registry.model.bundle import Bundle
from registry.model.image.decode import decode_image
from service import create_app
from service.access.auth import AccessControl
from service.loading.model_slot import ModelSlot
from service.observability.metrics import Metrics
from service.observability.tracing.options import TracingOptions
from service.protocols.grpc_v2 import inference_pb2 as pb
from service.protocols.grpc_v2.server import AT_WORK, GrpcServer
from service.protocols.grpc_v2.service import HEALTH_SERVICE
from service.settings import Settings
from tests.conftest import WAIT_TIMEOUT_S, free_port, wait_for
from tests.otlp_receiver import attributes, running_collector
from tests.service.protocols.grpc_caller import SERVICE, Caller, request
from tests.service.protocols.tensors import bytes_tensor, normalised
from tests.service.spans_process import spans_process
from training.data.sources import Dataset


@pytest.fixture
def serve(
    slot: ModelSlot, settings: Settings, metrics: Metrics
) -> Iterator[Callable[..., tuple[Caller, GrpcServer, Flask]]]:
    """Starts a gRPC server with other settings; returns a client, the server, and the app."""
    started: list[tuple[Caller, GrpcServer]] = []

    def start(**changes: Any) -> tuple[Caller, GrpcServer, Flask]:
        port = free_port()
        app = create_app(replace(settings, grpc_port=port, **changes), {"digits": slot}, metrics)
        server = GrpcServer(app.extensions["convoy"])
        server.start()
        started.append((Caller(port), server))
        return *started[-1], app

    yield start
    for caller, server in started:
        caller.close()
        server.end(0, 0)
        assert server.join(WAIT_TIMEOUT_S)


@pytest.fixture
def caller(serve: Callable[..., tuple[Caller, GrpcServer, Flask]], ready: FlaskClient) -> Caller:
    """A client of a gRPC server that serves version 1, as ``ready`` does."""
    return serve()[0]


@pytest.fixture
def images(few_digits: Dataset) -> list[bytes]:
    return [few_digits.test.encode(index) for index in range(4)]


@pytest.fixture
def expected(ready: FlaskClient, images: list[bytes]) -> Any:
    """The probabilities that ``/v1/classify`` answers, float (4, 10)."""
    rows = []
    for each in images:
        found = ready.post("/v1/classify?top_k=10", data=each).get_json()["predictions"]
        rows.append([one["probability"] for one in sorted(found, key=lambda one: one["index"])])
    return np.array(rows)


def rows_of(answer: pb.ModelInferResponse) -> Any:
    """The probabilities of an answer, raw or typed."""
    tensor = answer.outputs[0]
    assert (tensor.name, tensor.datatype) == ("probabilities", "FP32")
    values: Any = tensor.contents.fp32_contents
    if answer.raw_output_contents:
        values = np.frombuffer(answer.raw_output_contents[0], "<f4")
    return np.reshape(values, list(tensor.shape))


def test_every_form_of_input_gets_the_probabilities_of_v1(
    caller: Caller, images: list[bytes], expected: Any, few_digits: Dataset
) -> None:
    pixels = np.stack([decode_image(each, few_digits.preprocess) for each in images])
    floats = normalised(pixels, few_digits.preprocess)
    messages = {
        "BYTES raw": request("BYTES", (4,), bytes_tensor(images)),
        "BYTES raw column": request("BYTES", (4, 1), bytes_tensor(images)),
        "UINT8 raw": request("UINT8", pixels.shape, pixels.tobytes()),
        "FP32 raw": request("FP32", floats.shape, floats.tobytes()),
        "BYTES typed": request("BYTES", (4,)),
        "UINT8 typed": request("UINT8", pixels.shape),
        "FP32 typed": request("FP32", floats.shape),
    }
    messages["BYTES typed"].inputs[0].contents.bytes_contents.extend(images)
    messages["UINT8 typed"].inputs[0].contents.uint_contents.extend(pixels.ravel().tolist())
    messages["FP32 typed"].inputs[0].contents.fp32_contents.extend(floats.ravel().tolist())
    for name, message in messages.items():
        answer = caller.infer(message)
        np.testing.assert_allclose(rows_of(answer), expected, atol=1e-5, err_msg=name)
        assert bool(answer.raw_output_contents) == ("raw" in name)


def test_an_answer_has_the_id_the_version_and_the_wanted_outputs(
    caller: Caller, images: list[bytes], expected: Any
) -> None:
    message = request(raw=bytes_tensor(images[:1]), id="7", model_version="champion")
    wanted = message.outputs.add(name="probabilities")
    wanted.parameters["classification"].int64_param = 2
    message.outputs.add(name="labels")
    message.parameters["top_k"].int64_param = 3
    answer, metadata = caller.call("ModelInfer", message, x_request_id="abc")
    assert (answer.id, answer.model_name, answer.model_version) == ("7", "digits", "1")
    assert (metadata["x-request-id"], metadata["x-model-version"]) == ("abc", "1")
    assert [list(each.shape) for each in answer.outputs] == [[1, 2], [1, 3]]
    best = int(expected[0].argmax())
    (length,) = struct.unpack_from("<I", answer.raw_output_contents[0])
    text = answer.raw_output_contents[0][4 : 4 + length].decode()
    assert text.split(":")[1:] == [str(best), str(best)]
    assert answer.raw_output_contents[1][4:5].decode() == str(best)


TOO_MANY = request()
TOO_MANY.inputs.add(name="y", datatype="BYTES", shape=(1,))
SHARED = request()
SHARED.inputs[0].parameters["shared_memory_region"].string_param = "x"
TWO_RAW = request(raw=b"")
TWO_RAW.raw_input_contents.append(b"")
OTHER_OUTPUT = request(raw=b"")
OTHER_OUTPUT.outputs.add(name="logits")
MANY_OUTPUTS = request(raw=b"")
for _ in range(5_000):
    MANY_OUTPUTS.outputs.add(name="labels")
SEQUENCE = request(raw=b"")
SEQUENCE.parameters["sequence_id"].uint64_param = 3


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        (pb.ModelInferRequest(model_name="digits"), "INVALID_ARGUMENT", "0 inputs"),
        (TOO_MANY, "INVALID_ARGUMENT", "2 inputs"),
        (SHARED, "INVALID_ARGUMENT", "shared memory"),
        (TWO_RAW, "INVALID_ARGUMENT", "2 raw_input_contents"),
        (OTHER_OUTPUT, "INVALID_ARGUMENT", "no output 'logits'"),
        (MANY_OUTPUTS, "INVALID_ARGUMENT", "each output once"),
        (request("UINT8", (1, 2000, 2000, 1)), "INVALID_ARGUMENT", "raw_input_contents"),
        (request(raw=b"", model="x" * 20_000), "NOT_FOUND", "no model 'xxx"),
        (request(raw=b"", model_version="x" * 20_000), "NOT_FOUND", "alias 'xxx"),
        (SEQUENCE, "INVALID_ARGUMENT", "sequences are not supported"),
        (request("INT64", (1,), b""), "INVALID_ARGUMENT", "'INT64'"),
        (request("BYTES", (10**6,), b""), "INVALID_ARGUMENT", "1 to 4"),
        (request("BYTES", (1,), b"\xff\xff\xff\xff"), "INVALID_ARGUMENT", "element 0"),
        (request("BYTES", (1,)), "INVALID_ARGUMENT", "0 bytes_contents"),
        (request("BYTES", (1,), bytes_tensor([b"bad"])), "INVALID_ARGUMENT", "not a JPEG"),
        (request("UINT8", (1, 8, 8, 1), b"x"), "INVALID_ARGUMENT", "need 64"),
        (request("UINT8", (1, 4, 4, 1), b"x" * 16), "INVALID_ARGUMENT", "(8, 8, 1)"),
        (request("FP32", (1, 1, 8, 8)), "INVALID_ARGUMENT", "0 values"),
        (request(raw=b"", model="other"), "NOT_FOUND", "no model 'other'"),
        (request(raw=b"", model_version="7"), "NOT_FOUND", "version 7"),
        (request(raw=b"", model_version="x"), "NOT_FOUND", "alias 'x'"),
    ],
)
def test_a_malformed_request_has_a_status_and_a_reason(
    caller: Caller, message: pb.ModelInferRequest, code: str, reason: str
) -> None:
    status, details = caller.refusal("ModelInfer", message)
    assert status == code
    assert reason in details


def test_a_message_over_the_limit_is_refused(
    serve: Callable[..., tuple[Caller, GrpcServer, Flask]], ready: FlaskClient
) -> None:
    caller, _, _ = serve(max_body_bytes=400_000)
    message = request(raw=bytes_tensor([b"x" * 400_000]))
    assert caller.refusal("ModelInfer", message)[0] == "RESOURCE_EXHAUSTED"
    image = request(raw=bytes_tensor([b"x" * 100_001]))
    assert "100,001 bytes" in caller.refusal("ModelInfer", image)[1]


def test_metadata_configuration_and_index_are_those_of_http(
    caller: Caller, ready: FlaskClient
) -> None:
    server, _ = caller.call("ServerMetadata", pb.ServerMetadataRequest())
    assert list(server.extensions) == ready.get("/v2").get_json()["extensions"]
    model, _ = caller.call("ModelMetadata", pb.ModelMetadataRequest(name="digits"))
    found = ready.get("/v2/models/digits").get_json()
    for tensors, wanted in ((model.inputs, found["inputs"]), (model.outputs, found["outputs"])):
        assert [(each.name, each.datatype, list(each.shape)) for each in tensors] == [
            (each["name"], each["datatype"], each["shape"]) for each in wanted
        ]
    answer, _ = caller.call("ModelConfig", pb.ModelConfigRequest(name="digits"))
    config = ready.get("/v2/models/digits/config").get_json()
    assert answer.config.max_batch_size == config["max_batch_size"]
    assert answer.config.parameters["labels"].string_value.startswith('["0"')
    assert pb.DataType.Name(answer.config.input[1].data_type) == "TYPE_UINT8"
    default, _ = caller.call("ModelMetadata", pb.ModelMetadataRequest())
    assert default.name == "digits"
    index, _ = caller.call("RepositoryIndex", pb.RepositoryIndexRequest())
    assert [(each.name, each.version, each.state) for each in index.models] == [
        ("digits", "1", "READY")
    ]


def test_statistics_and_metrics_count_calls(
    caller: Caller, ready: FlaskClient, images: list[bytes]
) -> None:
    caller.infer(request("BYTES", (4,), bytes_tensor(images)))
    caller.refusal("ModelInfer", request(raw=bytes_tensor([b"bad"])))
    answer, _ = caller.call("ModelStatistics", pb.ModelStatisticsRequest(name="digits"))
    (found,) = answer.model_stats
    assert (found.inference_count, found.inference_stats.success.count) == (4, 1)
    assert found.inference_stats.fail.count == 1
    alias = pb.ModelStatisticsRequest(name="digits", version="champion")
    assert caller.call("ModelStatistics", alias)[0].model_stats[0].version == "1"
    unknown = pb.ModelStatisticsRequest(name="digits", version="7")
    assert caller.refusal("ModelStatistics", unknown)[0] == "NOT_FOUND"
    labels = 'model_name="digits",model_version="1"'
    for outcome in ("ok", "client_error"):
        line = f'convoy_requests_total{{{labels},outcome="{outcome}",protocol="grpc"}} 1.0'
        assert line in ready.get("/metrics").text


def test_readiness_follows_the_models_and_the_end(
    serve: Callable[..., tuple[Caller, GrpcServer, Flask]],
    slot: ModelSlot,
    deploy: Callable[..., Bundle],
    images: list[bytes],
) -> None:
    caller, server, _ = serve()

    def states() -> tuple[bool, bool, str]:
        ready, _ = caller.call("ServerReady", pb.ServerReadyRequest())
        live, _ = caller.call("ServerLive", pb.ServerLiveRequest())
        health = caller.call("Check", health_pb2.HealthCheckRequest(), HEALTH_SERVICE)
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(health[0].status)
        return live.live, ready.ready, status

    assert states() == (True, False, "NOT_SERVING")
    message = pb.ModelReadyRequest(name="digits")
    assert caller.refusal("ModelReady", message)[0] == "UNAVAILABLE"
    deploy(1)
    assert slot.refresh()
    assert states() == (True, True, "SERVING")
    assert caller.call("ModelReady", message)[0].ready
    server.end(3600, 1)  # it still serves during the delay
    assert states() == (True, False, "NOT_SERVING")
    caller.infer(request(raw=bytes_tensor(images[:1])))


def test_calls_that_have_begun_are_answered_before_the_end(
    serve: Callable[..., tuple[Caller, GrpcServer, Flask]],
    deploy: Callable[..., Bundle],
    slot: ModelSlot,
    images: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deploy(1)
    assert slot.refresh()
    caller, server, app = serve(graceful_timeout_s=5)  # connections end after 2 s
    pipeline = app.extensions["convoy"].pipeline
    begun, go_on = threading.Event(), threading.Event()
    finish = type(pipeline).finish

    def slow(self: Any, *arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(WAIT_TIMEOUT_S)
        return finish(self, *arguments)

    monkeypatch.setattr(type(pipeline), "finish", slow)
    answers: list[pb.ModelInferResponse] = []
    message = request(raw=bytes_tensor(images[:1]))
    thread = threading.Thread(target=lambda: answers.append(caller.infer(message)))
    thread.start()
    assert begun.wait(WAIT_TIMEOUT_S)
    server.end(0, WAIT_TIMEOUT_S)
    go_on.set()
    assert server.join(WAIT_TIMEOUT_S)
    thread.join()
    assert answers[0].model_version == "1"
    assert caller.refusal("ServerLive", pb.ServerLiveRequest())[0] == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("role", "infers", "reads", "views"),
    [
        ("classify", "OK", "OK", "PERMISSION_DENIED"),
        ("viewer", "PERMISSION_DENIED", "OK", "OK"),
        ("admin", "OK", "OK", "OK"),
        (None, "UNAUTHENTICATED", "UNAUTHENTICATED", "UNAUTHENTICATED"),
    ],
)
def test_each_role_may_do_only_what_it_permits(
    serve: Callable[..., tuple[Caller, GrpcServer, Flask]],
    deploy: Callable[..., Bundle],
    slot: ModelSlot,
    images: list[bytes],
    tmp_path: Path,
    role: Any,
    infers: str,
    reads: str,
    views: str,
) -> None:
    deploy(1)
    assert slot.refresh()
    tokens = tmp_path / "tokens.json"
    text = Tokens(tokens).add(role, role) if role else ""
    caller, _, _ = serve(auth="required", tokens=tokens)
    metadata = {"authorization": f"Bearer {text}"} if role else {}

    def status(name: str, message: Message) -> str:
        try:
            caller.call(name, message, **metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"

    assert status("ModelInfer", request(raw=bytes_tensor(images[:1]))) == infers
    for name in ("ModelMetadata", "ModelConfig"):
        assert status(name, getattr(pb, f"{name}Request")(name="digits")) == reads
    for name in ("ModelStatistics", "RepositoryIndex"):
        assert status(name, getattr(pb, f"{name}Request")()) == views
    for name in ("ServerLive", "ServerReady", "ServerMetadata"):
        assert status(name, getattr(pb, f"{name}Request")()) == "OK"
    assert status("ModelReady", pb.ModelReadyRequest(name="digits")) == "OK"


@pytest.mark.parametrize(
    ("path", "number"), [("ModelInfer", 20), ("ModelInfer", 300), ("Check", 300)]
)
def test_clients_that_never_send_their_message_do_not_block_the_others(
    serve: Callable[..., tuple[Caller, GrpcServer, Flask]],
    ready: FlaskClient,
    images: list[bytes],
    path: str,
    number: int,
) -> None:
    caller, _, app = serve()
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(WAIT_TIMEOUT_S)
        yield from ()

    def answers() -> bool:
        try:
            assert caller.call("ServerLive", pb.ServerLiveRequest())[0].live
            answer = caller.infer(request(raw=bytes_tensor(images[:1])))
        except grpc.RpcError as error:  # 256 calls are there, until those waiting too long end
            refused: Any = error
            assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            return False
        return answer.model_version == "1"

    port = app.extensions["convoy"].settings.grpc_port
    clients = [Caller(port) for _ in range(number // 50 + 1)]
    service = HEALTH_SERVICE if path == "Check" else SERVICE
    for index in range(number):
        clients[index // 50].begin(path, nothing(), service=service)
    try:
        wait_for(answers)
    finally:
        over.set()
        for each in clients:
            each.close()


def test_a_compressed_message_is_refused(caller: Caller, images: list[bytes]) -> None:
    send = caller.compressing("ModelInfer")
    message = request(raw=bytes_tensor(images[:1] * 4), shape=(4,)).SerializeToString()
    with pytest.raises(grpc.RpcError) as raised:
        send(message, timeout=WAIT_TIMEOUT_S)
    error: Any = raised.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_time_that_a_message_takes_to_arrive_does_not_count_as_waiting(
    serve: Callable[..., tuple[Caller, GrpcServer, Flask]],
    ready: FlaskClient,
    images: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caller, _, app = serve()
    pipeline = type(app.extensions["convoy"].pipeline)
    submit, started, sent = pipeline.submit, [], []

    def noted(self: Any, job: Any) -> Any:
        started.append(job.request.started)
        return submit(self, job)

    monkeypatch.setattr(pipeline, "submit", noted)

    def slowly() -> Iterator[bytes]:
        caller.call("ServerLive", pb.ServerLiveRequest())  # the call's head has arrived, too
        sent.append(time.perf_counter())
        yield request(raw=bytes_tensor(images[:1])).SerializeToString()

    caller.begin("ModelInfer", slowly()).result()
    assert started[0] >= sent[0]


def test_a_call_without_a_token_is_refused_before_its_message_arrives(
    serve: Callable[..., tuple[Caller, GrpcServer, Flask]],
    ready: FlaskClient,
    tmp_path: Path,
) -> None:
    caller, _, _ = serve(auth="required", tokens=tmp_path / "tokens.json")
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(WAIT_TIMEOUT_S)
        yield from ()

    call = caller.begin("ModelInfer", nothing())
    try:
        assert call.code() is grpc.StatusCode.UNAUTHENTICATED
    finally:
        over.set()


def test_a_call_that_its_client_has_given_up_is_not_classified(
    serve: Callable[..., tuple[Caller, GrpcServer, Flask]],
    ready: FlaskClient,
    images: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caller, _, app = serve()
    pipeline = type(app.extensions["convoy"].pipeline)
    begun, go_on = threading.Semaphore(0), threading.Event()
    submitted: list[Any] = []
    submit = pipeline.submit

    def slow(self: Any, job: Any) -> Any:
        submitted.append(job)
        begun.release()
        assert go_on.wait(WAIT_TIMEOUT_S)
        return submit(self, job)

    monkeypatch.setattr(pipeline, "submit", slow)
    message = request(raw=bytes_tensor(images[:1])).SerializeToString()
    at_work = [caller.begin("ModelInfer", iter([message])) for _ in range(AT_WORK)]
    for _ in at_work:
        assert begun.acquire(timeout=WAIT_TIMEOUT_S)
    given_up = caller.begin("ModelInfer", iter([message]))
    live = pb.ServerLiveRequest()
    assert caller.call("ServerLive", live)[0].live  # the call before has arrived, too
    given_up.cancel()
    assert caller.call("ServerLive", live)[0].live  # and so has its end
    with pytest.raises(grpc.FutureCancelledError):
        given_up.result()
    go_on.set()
    for each in at_work:
        each.result()
    caller.infer(request(raw=bytes_tensor(images[:1])))
    assert len(submitted) == AT_WORK + 1


def test_metadata_with_underscores_do_not_replace_what_a_proxy_sets(
    serve: Callable[..., tuple[Caller, GrpcServer, Flask]],
    ready: FlaskClient,
    images: list[bytes],
) -> None:
    caller, _, _ = serve(rate_limit=0.01, burst=1, trusted_proxies="127.0.0.0/8")
    message = request(raw=bytes_tensor(images[:1]))
    caller.infer(message, **{"x-forwarded-for": "192.0.2.1"})
    for forged in ("198.51.100.1", "198.51.100.2"):
        pairs = (("x-forwarded-for", "192.0.2.1"), ("x_forwarded_for", forged))
        with pytest.raises(grpc.RpcError) as raised:
            caller.begin("ModelInfer", iter([message.SerializeToString()]), pairs).result()
        error: Any = raised.value
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_client_over_its_rate_learns_when_to_retry(
    serve: Callable[..., tuple[Caller, GrpcServer, Flask]],
    deploy: Callable[..., Bundle],
    slot: ModelSlot,
    images: list[bytes],
) -> None:
    deploy(1)
    assert slot.refresh()
    caller, _, _ = serve(rate_limit=0.01, burst=1)
    message = request(raw=bytes_tensor(images[:1]))
    caller.infer(message)
    with pytest.raises(grpc.RpcError) as raised:
        caller.infer(message)
    error: Any = raised.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(error.trailing_metadata())["retry-after"] == "100"


def self_signed(folder: Path) -> tuple[Path, Path]:
    """The files of a certificate for 127.0.0.1, which signs itself, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "convoy")])
    now = datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + timedelta(days=1))
    certificate = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    files = folder / "tls.crt", folder / "tls.key"
    files[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    files[1].write_bytes(pem)
    return files


def test_with_a_certificate_only_clients_with_tls_are_answered(
    serve: Callable[..., tuple[Caller, GrpcServer, Flask]],
    ready: FlaskClient,
    images: list[bytes],
    tmp_path: Path,
) -> None:
    certificate, key = self_signed(tmp_path)
    plain, _, app = serve(grpc_certificate=certificate, grpc_key=key)
    assert plain.refusal("ServerLive", pb.ServerLiveRequest())[0] == "UNAVAILABLE"
    port = app.extensions["convoy"].settings.grpc_port
    secure = Caller(port, grpc.ssl_channel_credentials(certificate.read_bytes()))
    assert secure.infer(request(raw=bytes_tensor(images[:1]))).model_version == "1"
    secure.close()


def test_a_certificate_that_cannot_be_read_stops_the_start(
    serve: Callable[..., tuple[Caller, GrpcServer, Flask]], tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="missing"):
        serve(grpc_certificate=tmp_path / "missing.crt", grpc_key=tmp_path / "missing.key")


def test_an_error_while_a_call_is_recorded_does_not_reach_the_client(
    serve: Callable[..., tuple[Caller, GrpcServer, Flask]],
    ready: FlaskClient,
    images: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> tuple[str, str | None]:
        raise ValueError("no client")

    monkeypatch.setattr(AccessControl, "describe", fail)
    caller, _, _ = serve(access_log="on")
    assert caller.infer(request(raw=bytes_tensor(images[:1]))).model_version == "1"
    status, _ = caller.refusal("ModelInfer", request(raw=b"", model="other"))
    assert status == "NOT_FOUND"


def test_a_call_has_a_span_that_continues_the_callers_trace(
    serve: Callable[..., tuple[Caller, GrpcServer, Flask]],
    ready: FlaskClient,
    images: list[bytes],
    tmp_path: Path,
) -> None:
    trace, parent = "4b" * 16, "0f" * 8
    with running_collector() as collector:
        options = TracingOptions(endpoint=f"{collector.endpoint}/v1/traces")
        caller, _, app = serve(tracing=options, run_folder=tmp_path)
        traceparent = {"traceparent": f"00-{trace}-{parent}-01"}
        with spans_process(tmp_path / "spans", options):
            caller.call("ServerReady", pb.ServerReadyRequest(), **traceparent)
            caller.infer(request(raw=bytes_tensor(images[:1])), **traceparent)
            caller.refusal("ModelInfer", request(raw=b"", model="other"), **traceparent)
            app.extensions["convoy"].recorder.close(60)
    answered, refused = collector.servers()
    for span, code in ((answered, 0), (refused, 5)):
        assert span.name == "inference.GRPCInferenceService/ModelInfer"
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (trace, parent)
        found = attributes(span.attributes)
        assert (found["rpc.system"], found["rpc.grpc.status_code"]) == ("grpc", code)
        assert found["convoy.protocol"] == "grpc"
    stages = [each.name for each in collector.children(answered)]
    assert stages == ["decode", "queue", "forward", "encode"]
    assert collector.children(refused) == []
