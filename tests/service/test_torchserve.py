"""``POST /predictions/{model}``: TorchServe's clients get the answers that they expect."""

import io

import pytest
from flask.testing import FlaskClient

from service.loading.model_slot import ModelSlot

RAW = {"content_type": "application/octet-stream"}


def as_object(predictions: list[dict[str, object]]) -> dict[str, object]:
    return {str(each["label"]): each["probability"] for each in predictions}


def test_labels_and_probabilities_are_those_of_v1(ready: FlaskClient, png: bytes) -> None:
    v1 = ready.post("/v1/classify", data=png, **RAW).get_json()
    answer = ready.post("/predictions/digits", data=png, **RAW)
    assert answer.status_code == 200
    assert answer.headers["X-Model-Version"] == "1"
    probabilities = answer.get_json()
    assert probabilities == as_object(v1["predictions"])
    assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)


@pytest.mark.parametrize("path", ["/predictions/digits/1", "/predictions/digits/"])
def test_put_classifies_an_image_as_curl_sends_it(
    ready: FlaskClient, png: bytes, path: str
) -> None:
    assert len(ready.put(path, data=png).get_json()) == 5


@pytest.mark.parametrize("part", ["data", "body", "image"])
def test_a_form_may_use_the_part_names_of_torchserve(
    ready: FlaskClient, png: bytes, part: str
) -> None:
    answer = ready.post("/predictions/digits", data={part: (io.BytesIO(png), "x.png")})
    assert len(answer.get_json()) == 5


def test_several_images_give_a_list(ready: FlaskClient, png: bytes) -> None:
    files = [(io.BytesIO(each), "x.png") for each in (png, b"bad")]
    first, second = ready.post("/predictions/digits", data={"image": files}).get_json()
    assert len(first) == 5
    assert second["error"]["status"] == 415


@pytest.mark.parametrize(
    ("path", "status"),
    [("/predictions/other", 404), ("/predictions/digits/7", 404), ("/predictions/digits", 415)],
)
def test_errors_are_problem_json(ready: FlaskClient, path: str, status: int) -> None:
    answer = ready.post(path, data=b"not an image", **RAW)
    assert (answer.status_code, answer.get_json()["status"]) == (status, status)
    assert answer.content_type == "application/problem+json"


def test_another_method_is_405_with_the_allowed_methods(ready: FlaskClient) -> None:
    answer = ready.get("/predictions/digits")
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "POST, PUT"


def test_requests_count_in_the_traffic_as_those_of_v1(
    ready: FlaskClient, slot: ModelSlot, png: bytes
) -> None:
    for _ in range(3):
        ready.post("/predictions/digits", data=png, **RAW)
    (version,) = ready.get("/v1/models/digits/traffic").get_json()["versions"]
    assert version["requests"] == 3
