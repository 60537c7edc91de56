"""The Open Inference Protocol over HTTP: forms of input and output, errors, other routes."""

import base64
import json
import struct
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from registry.model.image.decode import decode_image
from tests.service.protocols.tensors import (
    BINARY,
    JSON,
    bytes_tensor,
    forms,
    in_binary,
    in_json,
    normalised,
    tensor,
)
from training.data.sources import Dataset

URL = "/v2/models/digits/infer"
ALL_BINARY = {"parameters": {"binary_data_output": True}}


@pytest.fixture
def images(few_digits: Dataset) -> list[bytes]:
    return [few_digits.test.encode(index) for index in range(4)]


@pytest.fixture
def pixels(images: list[bytes], few_digits: Dataset) -> Any:
    return np.stack([decode_image(each, few_digits.preprocess) for each in images])


@pytest.fixture
def expected(ready: FlaskClient, images: list[bytes]) -> Any:
    """The probabilities that ``/v1/classify`` answers, float (4, 10)."""
    texts = [base64.b64encode(each).decode() for each in images]
    results = ready.post("/v1/classify?top_k=10", json={"images": texts}).get_json()["results"]
    return np.array(
        [
            [each["probability"] for each in sorted(one["predictions"], key=lambda e: e["index"])]
            for one in results
        ]
    )


def outputs(answer: TestResponse) -> dict[str, Any]:
    """The outputs of an answer by name, whichever form each has."""
    assert answer.status_code == 200, answer.text
    length = answer.headers.get("Inference-Header-Content-Length")
    head = json.loads(answer.data[: int(length)] if length else answer.data)
    rest = answer.data[int(length) :] if length else b""
    found = {}
    for each in head["outputs"]:
        if "data" in each:
            values = each["data"]
        else:
            size = each["parameters"]["binary_data_size"]
            data, rest = rest[:size], rest[size:]
            values = elements(data) if each["datatype"] == "BYTES" else np.frombuffer(data, "<f4")
        found[each["name"]] = np.array(values).reshape(each["shape"])
    assert rest == b""
    return found


def elements(data: bytes) -> list[str]:
    found, at = [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + length].decode())
        at += 4 + length
    return found


def refusal(answer: TestResponse, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.content_type == JSON
    assert answer.get_json()["error"] == answer.get_json()["detail"]
    return str(answer.get_json()["error"])


def test_every_form_of_input_gets_the_probabilities_of_v1(
    ready: FlaskClient, images: list[bytes], pixels: Any, expected: Any, few_digits: Dataset
) -> None:
    for name, request in forms(images, pixels, few_digits.preprocess).items():
        found = outputs(ready.post(URL, **request))
        np.testing.assert_allclose(found["probabilities"], expected, atol=1e-5, err_msg=name)
        assert found["labels"].tolist() == [[str(best)] for best in expected.argmax(axis=1)]


@pytest.mark.parametrize("members", [{}, ALL_BINARY])
def test_outputs_are_the_same_in_json_and_in_binary(
    ready: FlaskClient, images: list[bytes], expected: Any, members: dict[str, Any]
) -> None:
    answer = ready.post(URL, **in_binary("BYTES", [4], bytes_tensor(images), **members))
    assert answer.content_type == (BINARY if members else JSON)
    assert answer.headers["X-Model-Version"] == "1"
    np.testing.assert_allclose(outputs(answer)["probabilities"], expected, atol=1e-6)


def test_a_body_without_json_is_one_encoded_image(
    ready: FlaskClient, images: list[bytes], expected: Any
) -> None:
    headers = {"Inference-Header-Content-Length": "0"}
    answer = ready.post(URL, data=images[0], headers=headers)
    assert answer.content_type == BINARY
    np.testing.assert_allclose(outputs(answer)["probabilities"], expected[:1], atol=1e-6)
    assert "not a JPEG" in refusal(ready.post(URL, data=b"picture", headers=headers), 415)
    too_large = ready.post(URL, data=b"x" * 100_001, headers=headers)
    assert "100,001 bytes" in refusal(too_large, 413)


def test_the_answer_has_the_requests_id_and_only_the_wanted_outputs(
    ready: FlaskClient, images: list[bytes], expected: Any
) -> None:
    wanted = [{"name": "labels", "parameters": {"binary_data": True}}, {"name": "probabilities"}]
    request = in_binary("BYTES", [4], bytes_tensor(images), id="a 7", outputs=wanted)
    answer = ready.post(URL, **request)
    head = json.loads(answer.data[: int(answer.headers["Inference-Header-Content-Length"])])
    assert (head["model_name"], head["model_version"], head["id"]) == ("digits", "1", "a 7")
    assert [each["name"] for each in head["outputs"]] == ["labels", "probabilities"]
    assert outputs(answer)["labels"].tolist() == [[str(each)] for each in expected.argmax(axis=1)]
    only = in_binary("BYTES", [4], bytes_tensor(images), outputs=[{"name": "labels"}])
    assert list(outputs(ready.post(URL, **only))) == ["labels"]
    assert "id" not in ready.post(URL, **only).get_json()


def test_members_that_are_null_count_as_missing(ready: FlaskClient, images: list[bytes]) -> None:
    nulls = dict.fromkeys(("id", "outputs", "parameters"))
    answer = ready.post(URL, **in_binary("BYTES", [4], bytes_tensor(images), **nulls))
    assert set(outputs(answer)) == {"probabilities", "labels"}


@pytest.mark.parametrize("members", [{}, ALL_BINARY])
def test_classification_and_top_k_are_best_first(
    ready: FlaskClient, images: list[bytes], expected: Any, members: dict[str, Any]
) -> None:
    parameters = {"top_k": 2, **members.get("parameters", {})}
    wanted = [{"name": "probabilities", "parameters": {"classification": 3}}, {"name": "labels"}]
    request = in_binary("BYTES", [4], bytes_tensor(images), outputs=wanted, parameters=parameters)
    found = outputs(ready.post(URL, **request))
    assert found["probabilities"].shape == (4, 3)
    order = np.argsort(-expected, kind="stable")
    for row, places, scores in zip(found["probabilities"], order, expected, strict=True):
        for text, place in zip(row, places, strict=False):
            value, index, label = text.split(":", 2)
            assert (int(index), label) == (place, str(place))
            assert float(value) == pytest.approx(scores[place], abs=1e-5)
    assert found["labels"].tolist() == [[str(each) for each in row[:2]] for row in order]


@pytest.mark.parametrize("number", [1, 4])
def test_one_bad_image_fails_the_request_and_its_place_is_named(
    ready: FlaskClient, images: list[bytes], number: int
) -> None:
    sent = [*images[: number - 1], b"no image"]
    text = refusal(ready.post(URL, **in_binary("BYTES", [number], bytes_tensor(sent))), 415)
    assert text.startswith("the body" if number == 1 else "image 3: ")


BAD_JSON = {
    "no JSON": (b"{", "not an inference request"),
    "a list": (b"[]", "not an inference request"),
    "no input": ({"inputs": []}, "length 1"),
    "two inputs": ({"inputs": [tensor("BYTES", [1], data=["aGk="])] * 2}, "length 1"),
    "no name": ({"inputs": [{"datatype": "BYTES", "shape": [1], "data": ["aGk="]}]}, "`name`"),
    "no shape": ({"inputs": [{"name": "x", "datatype": "BYTES", "data": ["a"]}]}, "`shape`"),
    "no data": ({"inputs": [tensor("BYTES", [1])]}, "has no data"),
    "another datatype": ({"inputs": [tensor("INT64", [1], data=[1])]}, "'INT64'"),
    "shape of BYTES": ({"inputs": [tensor("BYTES", [1, 2], data=["a"])]}, "[1, 2]"),
    "more shape": (
        {"inputs": [tensor("BYTES", [2], data=["aGk="])]},
        "one base64 string for each image",
    ),
    "less shape": (
        {"inputs": [tensor("BYTES", [1], data=["aGk=", "aGk="])]},
        "one base64 string for each image",
    ),
    "numbers in BYTES": (
        {"inputs": [tensor("BYTES", [1], data=[1])]},
        "one base64 string for each image",
    ),
    "shape of UINT8": ({"inputs": [tensor("UINT8", [64], data=[0] * 64)]}, "height, width"),
    "other size": ({"inputs": [tensor("UINT8", [1, 4, 4, 1], data=[0] * 16)]}, "(8, 8, 1)"),
    "too few values": ({"inputs": [tensor("UINT8", [1, 8, 8, 1], data=[0] * 63)]}, "63 values"),
    "no level": ({"inputs": [tensor("UINT8", [1, 8, 8, 1], data=[256] * 64)]}, "0 to 255"),
    "a text": ({"inputs": [tensor("UINT8", [1, 8, 8, 1], data=["0"] * 64)]}, "not a number"),
    "NaN": (
        b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [NaN]}]}',
        "JSON",
    ),
    "huge": ({"inputs": [tensor("FP32", [1, 1, 8, 8], data=[1e300] * 64)]}, "levels"),
    "negative side": ({"inputs": [tensor("UINT8", [1, -8, 8, 1], data=[])]}, "side"),
    "no image": ({"inputs": [tensor("BYTES", [0], data=[])]}, "0 images"),
    "long shape": ({"inputs": [tensor("BYTES", [1] * 100, data=[])]}, "shape have"),
    "shape of texts": ({"inputs": [tensor("BYTES", ["1"], data=[])]}, "shape cannot be read"),  # type: ignore[list-item]
    "too many images": ({"inputs": [tensor("BYTES", [1_000_000], data=["a"])]}, "1 to 4"),
    "long id": ({"inputs": [tensor("BYTES", [1], data=["a"])], "id": "x" * 1025}, "1024 char"),
    "other output": (
        {"inputs": [tensor("BYTES", [1], data=["a"])], "outputs": [{"name": "logits"}]},
        "no output 'logits'",
    ),
    "an output twice": (
        {"inputs": [tensor("BYTES", [1], data=["a"])], "outputs": [{"name": "labels"}] * 2},
        "each output once",
    ),
    "hundreds of outputs": (
        {"inputs": [tensor("BYTES", [1], data=["a"])], "outputs": [{"name": "labels"}] * 500},
        "each output once",
    ),
    "labels have no classification": (
        {
            "inputs": [tensor("BYTES", [1], data=["a"])],
            "outputs": [{"name": "labels", "parameters": {"classification": 2}}],
        },
        "no classification",
    ),
    "classification": (
        {
            "inputs": [tensor("BYTES", [1], data=["a"])],
            "outputs": [{"name": "probabilities", "parameters": {"classification": "3"}}],
        },
        "classification is '3'",
    ),
    "top_k": (
        {"inputs": [tensor("BYTES", [1], data=["a"])], "parameters": {"top_k": 0}},
        "top_k is '0'",
    ),
    "sequence": (
        {"inputs": [tensor("BYTES", [1], data=["a"])], "parameters": {"sequence_id": 7}},
        "sequences are not supported",
    ),
    "shared memory in": (
        {"inputs": [tensor("BYTES", [1], parameters={"shared_memory_region": "x"})]},
        "shared memory is not supported",
    ),
    "shared memory out": (
        {
            "inputs": [tensor("BYTES", [1], data=["a"])],
            "outputs": [{"name": "labels", "parameters": {"shared_memory_region": "x"}}],
        },
        "shared memory is not supported",
    ),
}


@pytest.mark.parametrize(("body", "reason"), BAD_JSON.values(), ids=list(BAD_JSON))
def test_a_malformed_request_is_400_with_its_reason(
    ready: FlaskClient, body: Any, reason: str
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert reason in refusal(ready.post(URL, data=data, content_type=JSON), 400)


def binary_with(**changes: Any) -> dict[str, Any]:
    """A good request in binary form with one part changed."""
    data = changes.get("data", bytes_tensor([b"one", b"two"]))
    size = changes.get("size", len(data))
    parameters = {} if size is None else {"binary_data_size": size}
    shape, datatype = changes.get("shape", [2]), changes.get("datatype", "BYTES")
    head = json.dumps({"inputs": [tensor(datatype, shape, parameters=parameters)]}).encode()
    length = str(changes.get("length", len(head)))
    headers = {"Inference-Header-Content-Length": length}
    return {"data": head + data, "content_type": BINARY, "headers": headers}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"length": 10**6}, "must be a number of bytes"),
        ({"length": "-1"}, "must be a number of bytes"),
        ({"length": "x"}, "must be a number of bytes"),
        ({"length": 1}, "not an inference request"),
        ({"length": 20}, "not an inference request"),
        ({"size": 3}, "binary_data_size is 3"),
        ({"size": "14"}, "binary_data_size is '14'"),
        ({"size": None}, "no binary_data_size"),
        ({"data": bytes_tensor([b"one"])}, "ends before its element 1"),
        ({"data": bytes_tensor([b"one", b"two", b"three"])}, "follow the last of the 2"),
        ({"data": bytes_tensor([b"one"]) + b"\xff\xff\xff\xff"}, "element 1 of the BYTES tensor"),
        ({"data": b""}, "ends before its element 0"),
        ({"datatype": "UINT8", "shape": [1, 8, 8, 1], "data": b"x" * 63}, "need 64"),
        ({"datatype": "FP32", "shape": [1, 1, 8, 8], "data": b"x" * 64}, "need 256"),
        ({"shape": [10**6]}, "1 to 4"),
    ],
)
def test_a_malformed_binary_request_is_400_with_its_reason(
    ready: FlaskClient, changes: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(ready.post(URL, **binary_with(**changes)), 400)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(
    ready: FlaskClient, pixels: Any, few_digits: Dataset, bad: float
) -> None:
    floats = normalised(pixels, few_digits.preprocess)
    floats[2, 0, 3, 4] = bad
    request = in_binary("FP32", list(floats.shape), floats.tobytes())
    assert "image 2: the values stand for" in refusal(ready.post(URL, **request), 400)


@pytest.mark.parametrize(("off", "status"), [(0.49, 200), (0.52, 400)])
def test_a_normalised_value_may_be_half_a_level_off(
    ready: FlaskClient, few_digits: Dataset, off: float, status: int
) -> None:
    levels = np.full((1, 8, 8, 1), 255 + off, np.float32)
    floats = normalised(levels, few_digits.preprocess)
    answer = ready.post(URL, **in_binary("FP32", [1, 1, 8, 8], floats.tobytes()))
    assert answer.status_code == status
    white = in_binary("UINT8", [1, 8, 8, 1], b"\xff" * 64)
    if status == 200:
        assert answer.get_json()["outputs"] == ready.post(URL, **white).get_json()["outputs"]


def test_an_image_over_the_limit_is_413(ready: FlaskClient) -> None:
    request = in_binary("BYTES", [1], bytes_tensor([b"x" * 100_001]))
    assert "100,001 bytes" in refusal(ready.post(URL, **request), 413)


def test_json_over_its_limit_is_413(ready: FlaskClient) -> None:
    body = b'{"id": "' + b"x" * 300_000 + b'"}'
    assert "300,010 bytes" in refusal(ready.post(URL, data=body, content_type=BINARY), 413)


def test_many_members_are_refused_before_they_are_parsed(ready: FlaskClient) -> None:
    many = ",".join(f'"{number}": 0' for number in range(4_000))
    start = '{"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "data": ["a"]'
    for body in (
        f'{start}, "parameters": {{{many}}}}}]}}',
        f'{start}}}], "parameters": {{{many}}}}}',
        f'{start}}}], "outputs": [{",".join(["{}"] * 9_000)}]}}',
    ):
        assert "bytes of JSON" in refusal(ready.post(URL, data=body, content_type=JSON), 400)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/models/digits/versions/1/infer", 200),
        ("/v2/models/digits/versions/champion/infer", 200),
        ("/v2/models/digits/versions/7/infer", 404),
        ("/v2/models/digits/versions/challenger/infer", 404),
        ("/v2/models/other/infer", 404),
    ],
)
def test_a_path_names_the_model_and_a_version_or_alias(
    ready: FlaskClient, images: list[bytes], path: str, status: int
) -> None:
    request = in_json("BYTES", [1], [base64.b64encode(images[0]).decode()])
    assert ready.post(path, **request).status_code == status


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
def test_the_server_lists_only_extensions_that_work(ready: FlaskClient, path: str) -> None:
    answer = ready.get(path)
    assert (answer.status_code, answer.get_json()["name"]) == (200, "convoy")
    assert answer.get_json()["extensions"] == [
        "binary_tensor_data",
        "classification",
        "model_configuration",
        "parameters",
        "statistics",
    ]


def test_health_follows_the_loaded_models(client: FlaskClient) -> None:
    assert client.get("/v2/health/live").get_json() == {"live": True}
    answer = client.get("/v2/health/ready")
    assert (answer.status_code, answer.get_json()) == (503, {"live": True, "ready": False})
    refusal(client.get("/v2/models/digits/ready"), 503)
    (entry,) = client.post("/v2/repository/index").get_json()
    assert (entry["name"], entry["state"]) == ("digits", "UNAVAILABLE")
    assert entry["reason"]


def test_a_ready_service_says_so(ready: FlaskClient) -> None:
    assert ready.get("/v2/health/ready").get_json() == {"live": True, "ready": True}
    for path in ("/v2/models/digits/ready", "/v2/models/digits/versions/1/ready"):
        assert ready.get(path).get_json() == {"name": "digits", "ready": True}
    for path in ("/v2/models/digits/versions/7/ready", "/v2/models/other/ready"):
        refusal(ready.get(path), 404)
    assert ready.post("/v2/repository/index").get_json() == [
        {"name": "digits", "version": "1", "state": "READY", "reason": ""}
    ]


def test_metadata_and_configuration_name_tensors_and_labels(
    ready: FlaskClient, few_digits: Dataset
) -> None:
    metadata = ready.get("/v2/models/digits").get_json()
    assert metadata["versions"] == ["1"]
    assert [(each["datatype"], each["shape"]) for each in metadata["inputs"]] == [
        ("BYTES", [-1]),
        ("UINT8", [-1, 8, 8, 1]),
        ("FP32", [-1, 1, 8, 8]),
    ]
    assert [(each["name"], each["shape"]) for each in metadata["outputs"]] == [
        ("probabilities", [-1, 10]),
        ("labels", [-1, -1]),
    ]
    assert metadata["parameters"]["labels"] == list(few_digits.labels)
    assert metadata["parameters"]["preprocess"]["mean"] == list(few_digits.preprocess.mean)
    assert metadata["parameters"]["plan"] == "torch-eager"
    config = ready.get("/v2/models/digits/versions/champion/config").get_json()
    assert config["max_batch_size"] == 4
    assert [each["dims"] for each in config["input"]] == [[1], [8, 8, 1], [1, 8, 8]]
    assert json.loads(config["parameters"]["labels"]["string_value"]) == list(few_digits.labels)


def test_statistics_count_images_batches_and_failures(
    ready: FlaskClient, images: list[bytes]
) -> None:
    for sent in (images, images[:1], [b"bad"]):
        ready.post(URL, **in_binary("BYTES", [len(sent)], bytes_tensor(sent)))
    paths = ("/v2/models/stats", "/v2/models/digits/stats", "/v2/models/digits/versions/1/stats")
    for path in paths:
        (found,) = ready.get(path).get_json()["model_stats"]
        assert (found["name"], found["version"]) == ("digits", "1")
        assert (found["inference_count"], found["execution_count"]) == (5, 2)
        stats = found["inference_stats"]
        assert (stats["success"]["count"], stats["fail"]["count"]) == (2, 1)
        parts = ("queue", "compute_input", "compute_infer", "compute_output")
        assert all(stats[part]["count"] == 2 for part in parts)
        assert 0 < sum(stats[part]["ns"] for part in parts) <= stats["success"]["ns"]
    refusal(ready.get("/v2/models/other/stats"), 404)


@pytest.mark.parametrize(
    ("method", "path", "reason"),
    [
        ("POST", "/v2/repository/models/digits/load", "in the registry"),
        ("POST", "/v2/repository/models/digits/unload", "in the registry"),
        ("GET", "/v2/systemsharedmemory/status", "shared memory"),
        ("POST", "/v2/cudasharedmemory/region/x/register", "shared memory"),
        ("GET", "/v2/models/digits/trace/setting", "trace settings"),
        ("GET", "/v2/logging", "log settings"),
        ("GET", "/v2/other", "/v2/other does not exist here"),
    ],
)
def test_parts_that_convoy_does_not_support_are_404_with_a_reason(
    ready: FlaskClient, method: str, path: str, reason: str
) -> None:
    assert reason in refusal(ready.open(path, method=method), 404)


def test_requests_count_by_protocol(ready: FlaskClient, images: list[bytes]) -> None:
    for sent in (images[:1], [b"bad"]):
        ready.post(URL, **in_binary("BYTES", [1], bytes_tensor(sent)))
    text = ready.get("/metrics").text
    labels = 'model_name="digits",model_version="1"'
    for outcome in ("ok", "client_error"):
        line = f'convoy_requests_total{{{labels},outcome="{outcome}",protocol="v2"}} 1.0'
        assert line in text
