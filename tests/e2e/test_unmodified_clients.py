"""Clients from PyPI and npm's Node, unmodified, against a real service.

``tritonclient`` and ``kserve`` run in a separate environment, which ``make test-all`` makes in
``.venv-clients``. Without it, their tests are skipped and say so.
"""

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import requests
from mlflow.deployments import get_deploy_client
from mlflow.pyfunc.scoring_server.client import ScoringServerClient

from registry.core.paths import Paths
from registry.model.image.decode import decode_image
from registry.model.refs import Canary
from registry.promotion.promotion import promote, start_canary
from registry.store.mlflow_store import ModelStore
from tests.conftest import WAIT_TIMEOUT_S, free_port, wait_for
from tests.e2e.processes import Service
from tests.service.protocols.tensors import forms, normalised
from training.data.sources import Dataset

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).with_name("programs")
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
NUMBER = 8
MANY = 200
PER_REQUEST = 25

needs_clients = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"{PYTHON} is missing: make test-all makes it"
)


@pytest.fixture
def pictures(digits: Dataset) -> list[bytes]:
    return [digits.test.encode(index) for index in range(NUMBER)]


@pytest.fixture
def folder(pictures: list[bytes], digits: Dataset, tmp_path: Path) -> Path:
    """What the programs read: encoded pictures, their pixels, and their normalised values."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, each in enumerate(pictures):
        (folder / f"{number:03}.png").write_bytes(each)
    pixels = np.stack([decode_image(each, digits.preprocess) for each in pictures])
    floats = normalised(pixels, digits.preprocess)
    np.savez(folder / "arrays.npz", pixels=pixels, normalised=floats)
    return folder


class GrpcService(NamedTuple):
    """A running service, and the port on which it speaks gRPC."""

    service: Service
    grpc_port: int


@contextmanager
def running(paths: Path) -> Iterator[GrpcService]:
    """A service that speaks gRPC, too; it ends with the context."""
    port = free_port()
    service = Service(paths, CONVOY_GRPC_PORT=str(port))
    try:
        wait_for(service.is_ready, "the service did not become ready")
        yield GrpcService(service, port)
    finally:
        if service.process.is_running():
            service.stop()


@pytest.fixture(scope="module")
def with_grpc(
    trained_paths: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GrpcService]:
    """One service for all tests that neither change the registry nor end the service."""
    paths = shutil.copytree(trained_paths, tmp_path_factory.mktemp("shared") / "home")
    with running(paths) as found:
        yield found


@pytest.fixture
def service(with_grpc: GrpcService) -> Service:
    return with_grpc.service


@pytest.fixture
def own(paths: Path) -> Iterator[GrpcService]:
    """A service for one test."""
    with running(paths) as found:
        yield found


def requests_of(service: Service, version: int) -> int:
    """How many requests the version has answered."""
    traffic = service.ask("GET", "/v1/models/digits/traffic")[1]["versions"]
    return sum(each["requests"] for each in traffic if each["version"] == version)


def address(service: Service) -> str:
    return f"http://127.0.0.1:{service.port}"


def probabilities(service: Service, pictures: list[bytes]) -> Any:
    """What ``/v1/classify`` answers for each picture alone, float (N, 10)."""
    rows = []
    for each in pictures:
        status, answer = service.ask("POST", "/v1/classify?top_k=10", each)
        assert status == 200
        by_index = sorted(answer["predictions"], key=lambda one: one["index"])
        rows.append([one["probability"] for one in by_index])
    return np.array(rows)


def answers(*command: str | Path) -> dict[str, Any]:
    """The JSON that a program printed."""
    done = subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, timeout=WAIT_TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def assert_equal(found: dict[str, Any], expected: Any) -> None:
    for form, rows in found.items():
        np.testing.assert_allclose(rows, expected, atol=1e-5, err_msg=form)


@needs_clients
def test_tritonclient_gets_health_metadata_answers_and_statistics(
    service: Service, folder: Path, pictures: list[bytes]
) -> None:
    expected = probabilities(service, pictures)
    found = answers(PYTHON, PROGRAMS / "triton_http.py", f"127.0.0.1:{service.port}", folder)
    assert [found[name] for name in ("live", "ready", "model_ready", "version_ready")] == [True] * 4
    assert found["other_ready"] is False
    assert_equal(found["probabilities"], expected)
    assert set(found["probabilities"]) == {
        *("bytes binary", "bytes_column binary"),
        *("pixels binary", "pixels json", "normalised binary", "normalised json"),
    }
    order = np.argsort(-expected, kind="stable")
    assert found["labels"] == [str(row[0]) for row in order]
    assert found["top_k"] == [[str(each) for each in row[:2]] for row in order]
    for texts, places in zip(found["classification"], order, strict=True):
        assert [text.split(":")[1:] for text in texts] == [[str(p), str(p)] for p in places[:3]]
    assert_equal({str(number): rows for number, rows in enumerate(found["async"])}, expected)
    assert_equal({"aio": found["aio"]}, expected)
    assert found["metadata"]["parameters"]["labels"] == [str(each) for each in range(10)]
    assert found["config"]["max_batch_size"] == 32
    assert found["index"] == [{"name": "digits", "version": "1", "state": "READY", "reason": ""}]
    (statistics,) = found["statistics"]["model_stats"]
    assert statistics["version"] == "1"
    statuses = {name: each["status"] for name, each in found["refused"].items()}
    unsupported = dict.fromkeys(("load", "shared", "trace", "unknown"), "404")
    assert statuses == {**unsupported, "sequence": "400", "gzip": "415"}
    assert all(each["message"] for each in found["refused"].values())


@needs_clients
def test_kserves_client_gets_health_and_answers(
    service: Service, folder: Path, pictures: list[bytes]
) -> None:
    found = answers(PYTHON, PROGRAMS / "kserve_rest.py", address(service), folder)
    assert (found["live"], found["ready"], found["model_ready"]) == (True, True, True)
    assert_equal(found["probabilities"], probabilities(service, pictures))
    assert len(found["probabilities"]) == 6
    assert found["refused"]["status"] == 404
    assert "no model 'other'" in found["refused"]["message"]


@needs_clients
def test_tritonclient_and_kserves_client_get_the_same_answers_over_grpc(
    with_grpc: GrpcService, folder: Path, pictures: list[bytes]
) -> None:
    service, port = with_grpc
    expected = probabilities(service, pictures)
    order = np.argsort(-expected, kind="stable")
    found = answers(PYTHON, PROGRAMS / "triton_grpc.py", f"127.0.0.1:{port}", folder)
    assert (found["live"], found["ready"], found["model_ready"]) == (True, True, True)
    assert_equal(found["probabilities"], expected)
    assert_equal({"async": found["async"], "aio": found["aio"]}, expected)
    assert len(found["probabilities"]) == 4
    assert found["labels"] == [str(row[0]) for row in order]
    for texts, places in zip(found["classification"], order, strict=True):
        assert [text.split(":")[1:] for text in texts] == [[str(p), str(p)] for p in places[:3]]
    assert found["config"]["config"]["max_batch_size"] == 32
    assert found["index"]["models"] == [{"name": "digits", "version": "1", "state": "READY"}]
    assert found["statistics"]["model_stats"][0]["version"] == "1"
    assert {name: each["status"] for name, each in found["refused"].items()} == {
        "load": "StatusCode.UNIMPLEMENTED",
        "unknown": "StatusCode.NOT_FOUND",
        "version": "StatusCode.NOT_FOUND",
        "sequence": "StatusCode.INVALID_ARGUMENT",
        "shape": "StatusCode.INVALID_ARGUMENT",
    }
    found = answers(PYTHON, PROGRAMS / "kserve_grpc.py", f"127.0.0.1:{port}", folder)
    assert (found["live"], found["ready"], found["model_ready"]) == (True, True, True)
    assert_equal(found["probabilities"], expected)
    assert len(found["probabilities"]) == 5
    health = [found[name] for name in ("health", "health inference.GRPCInferenceService")]
    assert health == [1, 1]  # SERVING
    assert found["health other"] == "NOT_FOUND"


@needs_clients
def test_a_service_that_ends_fails_no_call_that_a_client_has_sent(
    own: GrpcService, folder: Path
) -> None:
    service, port = own
    with load_of("grpc", port, folder) as load:
        wait_for(lambda: requests_of(service, 1) > 200, "no call was answered")
        assert service.stop() == 0
        printed, _ = load.communicate("", timeout=WAIT_TIMEOUT_S)
    # A call after the end finds no server. Each call that reached one is answered.
    errors = {error for error in json.loads(printed)["errors"] if "Connection refused" not in error}
    assert errors == set()


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_nodes_fetch_gets_the_same_answers_from_every_protocol(
    service: Service, folder: Path, pictures: list[bytes]
) -> None:
    expected = probabilities(service, pictures)
    found = answers("node", PROGRAMS / "fetch.mjs", address(service), folder)
    assert_equal(found["probabilities"], expected)
    assert len(found["probabilities"]) == 5
    for (label, score), row in zip(found["torchserve"], expected, strict=True):
        assert (label, score) == (str(row.argmax()), pytest.approx(row.max(), abs=1e-5))
    assert found["ping"] == {"status": "Healthy"}


def test_mlflows_clients_get_predictions(
    service: Service, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = probabilities(service, pictures)
    client = ScoringServerClient("127.0.0.1", service.port)
    client.ping()
    client.wait_server_ready()
    assert client.get_version()
    texts = [base64.b64encode(each).decode() for each in pictures]
    forms_of_input = {
        "frame": client.invoke(pd.DataFrame({"image": texts})),
        "list": client.invoke(texts),
        "array": client.invoke(np.array(texts), params={"top_k": 3}),
    }
    rows = {
        name: answer.get_predictions()["probabilities"].tolist()
        for name, answer in forms_of_input.items()
    }
    deployments = get_deploy_client(address(service))
    answer = deployments.predict(endpoint="digits", inputs={"inputs": texts})
    rows["deployments"] = [each["probabilities"] for each in answer["predictions"]]
    assert_equal(rows, expected)


def post(service: Service, path: str, **request: Any) -> Any:
    """The JSON that ``requests`` gets; ``request`` as Flask's client takes it."""
    headers = {"Content-Type": request["content_type"], **request.get("headers", {})}
    url = f"{address(service)}{path}"
    answer = requests.post(url, request["data"], headers=headers, timeout=WAIT_TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    return answer.json()


def of_every_protocol(
    service: Service, pictures: list[bytes], digits: Dataset
) -> Iterator[tuple[str, Any]]:
    """The probabilities (N, 10) that each protocol and form of input gets for ``pictures``."""
    texts = [base64.b64encode(each).decode() for each in pictures]
    pixels = np.stack([decode_image(each, digits.preprocess) for each in pictures])
    for name, request in forms(pictures, pixels, digits.preprocess).items():
        (tensor, _) = post(service, "/v2/models/digits/infer", **request)["outputs"]
        yield f"v2 {name}", np.reshape(tensor["data"], tensor["shape"])
    tables = {
        "inputs": {"inputs": texts},
        "instances": {"instances": [{"b64": text} for text in texts]},
        "split": {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
        "records": {"dataframe_records": [{"image": text} for text in texts]},
    }
    bodies = {name: (json.dumps(table), "application/json") for name, table in tables.items()}
    bodies["csv"] = ("\n".join(["image", *texts]), "text/csv")
    for name, (data, content_type) in bodies.items():
        answer = post(service, "/invocations", data=data, content_type=content_type)
        yield f"mlflow {name}", [each["probabilities"] for each in answer["predictions"]]


def test_200_pictures_get_the_same_answer_from_every_protocol_and_form(
    service: Service, digits: Dataset
) -> None:
    pictures = [digits.test.encode(index) for index in range(MANY)]
    expected = probabilities(service, pictures)
    counts: dict[str, int] = {}
    for start in range(0, MANY, PER_REQUEST):
        part = slice(start, start + PER_REQUEST)
        for name, rows in of_every_protocol(service, pictures[part], digits):
            np.testing.assert_allclose(rows, expected[part], atol=1e-5, err_msg=name)
            best = np.argmax(rows, axis=1)
            assert (best == expected[part].argmax(axis=1)).all(), name
            counts[name] = counts.get(name, 0) + len(rows)
    assert set(counts.values()) == {MANY}
    assert len(counts) == 15
    for picture, row in zip(pictures, expected, strict=True):
        status, answer = service.ask("POST", "/predictions/digits", picture)
        assert (status, next(iter(answer))) == (200, str(row.argmax()))


@contextmanager
def load_of(protocol: str, port: int, folder: Path) -> "Iterator[subprocess.Popen[str]]":
    """tritonclient sends requests until the load's input ends; then it prints what it got."""
    command = [PYTHON, PROGRAMS / "triton_load.py", protocol, f"127.0.0.1:{port}", folder]
    with subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as load:
        try:
            yield load
        finally:
            load.kill()


@needs_clients
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_canary_and_a_promotion_fail_no_request_of_tritonclient(
    paths: Path, own: GrpcService, folder: Path, protocol: str
) -> None:
    store = ModelStore(Paths(paths))
    service, grpc_port = own
    with load_of(protocol, grpc_port if protocol == "grpc" else service.port, folder) as load:
        wait_for(lambda: requests_of(service, 1) > 50, "version 1 does not answer")
        start_canary(store, "digits", Canary(version=2, share=0.5), "to see")
        wait_for(lambda: requests_of(service, 2) > 50, "the canary does not answer")
        promote(store, "digits", 2)
        wait_for(
            lambda: service.ask("GET", "/v1/models/digits")[1]["version"] == 2,
            "version 2 does not serve",
        )
        before = requests_of(service, 2)
        wait_for(lambda: requests_of(service, 2) > before + 200, "version 2 does not answer alone")
        printed, _ = load.communicate("", timeout=WAIT_TIMEOUT_S)
    found = json.loads(printed)
    assert found["errors"] == []
    assert set(found["versions"]) == {"1", "2"}
