"""``POST /v1/classify`` in every form of a body, and the answers to wrong requests."""

import base64
import json
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from PIL import Image

from registry.core.errors import DeadlineExceeded, Overloaded
from registry.model.bundle import Bundle
from service.loading.model_slot import ModelSlot
from tests.conftest import load_eager
from training.data.sources import Dataset

RAW = {"content_type": "application/octet-stream"}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def parts(*images: bytes) -> dict[str, object]:
    return {
        "data": {"image": [(BytesIO(data), f"{n}.png") for n, data in enumerate(images)]},
        "content_type": "multipart/form-data",
    }


def assert_problem(response: Any, status: int, text: str) -> None:
    assert response.status_code == status
    assert response.content_type == "application/problem+json"
    body = response.get_json()
    assert body["status"] == status
    assert text in body["detail"]
    assert body["error"] == body["detail"]
    assert body["request_id"] == response.headers["X-Request-Id"]


@pytest.mark.parametrize("kind", ["image/png", "application/octet-stream", "", None])
def test_a_raw_body_is_classified(ready: FlaskClient, png: bytes, kind: str | None) -> None:
    response = ready.post("/v1/classify", data=png, content_type=kind)
    assert response.status_code == 200
    body = response.get_json()
    assert body["model"] == {"name": "digits", "version": 1, "alias": "champion"}
    assert len(body["predictions"]) == 5
    probabilities = [each["probability"] for each in body["predictions"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert set(body["timings_ms"]) == {"decode", "queue", "forward", "total"}
    assert response.headers["X-Model-Version"] == "1"
    assert body["request_id"] == response.headers["X-Request-Id"]


def test_the_default_content_type_of_curl_is_accepted_as_an_image(
    ready: FlaskClient, png: bytes
) -> None:
    kind = "application/x-www-form-urlencoded"
    assert ready.post("/v1/classify", data=png, content_type=kind).status_code == 200


def test_all_body_forms_give_the_classifiers_probabilities(
    ready: FlaskClient, png: bytes, slot: ModelSlot, few_digits: Dataset
) -> None:
    from registry.model.bundle import open_bundle

    folder = slot._models_folder / "digits" / "versions" / "1"
    expected = load_eager(open_bundle(folder)).classify(few_digits.test.pixels[:1])[0]
    forms = [
        ready.post("/v1/classify?top_k=10", data=png, **RAW),
        ready.post("/v1/classify?top_k=10", **parts(png)),
        ready.post("/v1/classify?top_k=10", json={"image": b64(png)}),
    ]
    for response in forms:
        scores = {each["index"]: each["probability"] for each in response.get_json()["predictions"]}
        np.testing.assert_allclose([scores[n] for n in range(10)], expected, atol=1e-6)


@pytest.mark.parametrize("form", ["multipart", "json"])
def test_a_bad_image_does_not_fail_the_others(ready: FlaskClient, png: bytes, form: str) -> None:
    images = [png, b"\x89PNG\r\n\x1a\n but no more", png, b"no image"]
    if form == "multipart":
        response = ready.post("/v1/classify?top_k=1", **parts(*images))
    else:
        response = ready.post("/v1/classify?top_k=1", json={"images": [b64(i) for i in images]})
    assert response.status_code == 200
    results = response.get_json()["results"]
    assert [next(iter(result)) for result in results] == [
        "predictions",
        "error",
        "predictions",
        "error",
    ]
    assert [result["error"]["status"] for result in results[1::2]] == [422, 415]
    assert results[0] == results[2]


def test_a_multipart_body_may_have_large_and_unknown_parts(ready: FlaskClient, png: bytes) -> None:
    """Parts that span several chunks, one over its limit, and parts with unknown names."""
    body = {
        "image": [(BytesIO(each), "a.png") for each in (png, bytes(100_001), png)],
        "note": "a field",
        "other": (BytesIO(b"a file"), "other.png"),
    }
    response = ready.post("/v1/classify", data=body, content_type="multipart/form-data")
    results = response.get_json()["results"]
    assert [list(result) for result in results] == [["predictions"], ["error"], ["predictions"]]
    assert results[1]["error"]["status"] == 413
    field = {"picture": "a field"}
    refused = ready.post("/v1/classify", data=field, content_type="multipart/form-data")
    assert_problem(refused, 400, "no part named 'image'")


def test_a_file_name_may_be_in_any_encoding(ready: FlaskClient, png: bytes) -> None:
    head = 'Content-Disposition: form-data; name="image"; filename="Gemälde.png"'.encode("latin-1")
    body = b"--b\r\n" + head + b"\r\n\r\n" + png + b"\r\n--b--\r\n"
    kind = "multipart/form-data; boundary=b"
    assert ready.post("/v1/classify", data=body, content_type=kind).status_code == 200


def test_a_multipart_body_that_ends_early_is_400(ready: FlaskClient, png: bytes) -> None:
    boundary = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    kind = "multipart/form-data; boundary=b"
    refused = ready.post("/v1/classify", data=boundary + png, content_type=kind)
    assert_problem(refused, 400, "cannot be read")


def test_a_list_of_one_is_answered_with_a_list(ready: FlaskClient, png: bytes) -> None:
    body = ready.post("/v1/classify", json={"images": [b64(png)]}).get_json()
    assert len(body["results"]) == 1
    assert "predictions" not in body


def test_a_list_of_only_bad_images_still_has_an_entry_for_each(ready: FlaskClient) -> None:
    body = ready.post("/v1/classify", json={"images": ["?", "AAAA"]}).get_json()
    assert [each["error"]["status"] for each in body["results"]] == [422, 415]


def test_top_k_is_at_most_the_number_of_labels(ready: FlaskClient, png: bytes) -> None:
    for top_k, count in ((1, 1), (3, 3), (99, 10)):
        body = ready.post(f"/v1/classify?top_k={top_k}", data=png, **RAW).get_json()
        assert len(body["predictions"]) == count


@pytest.mark.parametrize("top_k", ["0", "-1", "x", "1.5", "", "²", "9" * 400])
def test_an_invalid_top_k_is_400(ready: FlaskClient, png: bytes, top_k: str) -> None:
    response = ready.post("/v1/classify", data=png, query_string={"top_k": top_k}, **RAW)
    assert_problem(response, 400, "top_k")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/digits/classify",
        "/v1/models/digits/versions/1/classify",
        "/v1/models/digits/aliases/champion/classify",
    ],
)
def test_a_path_may_name_the_model_version_or_alias(
    ready: FlaskClient, png: bytes, path: str
) -> None:
    assert ready.post(path, data=png, **RAW).get_json()["model"]["version"] == 1


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/v1/models/other/classify", "there is no model 'other' here; there are: digits"),
        ("/v1/models/digits/versions/2/classify", "version 2 is not served here"),
        ("/v1/models/digits/aliases/previous/classify", "alias 'previous' is not served here"),
        ("/v1/nowhere", "not found"),
    ],
)
def test_a_model_version_or_alias_that_is_not_served_is_404(
    ready: FlaskClient, png: bytes, path: str, reason: str
) -> None:
    assert_problem(ready.post(path, data=png, **RAW), 404, reason)


def test_a_wrong_method_is_405_with_the_allowed_methods(ready: FlaskClient) -> None:
    response = ready.get("/v1/classify")
    assert_problem(response, 405, "not allowed")
    assert "POST" in response.headers["Allow"]


def test_before_a_version_is_loaded_503_says_when_to_retry(client: FlaskClient, png: bytes) -> None:
    response = client.post("/v1/classify", data=png, **RAW)
    assert_problem(response, 503, "digits: nothing is deployed")
    assert int(response.headers["Retry-After"]) >= 1


@pytest.mark.parametrize(
    ("request_arguments", "status", "reason"),
    [
        ({"data": b"", **RAW}, 400, "the body is empty"),
        ({"data": b"%PDF-1.7", **RAW}, 415, "not a JPEG, PNG, WebP, GIF"),
        ({"data": b"\xff\xd8\xff\xe0 nothing", **RAW}, 422, "cannot be decoded"),
        ({"data": b"x" * 100_001, **RAW}, 413, "100,001 bytes; at most 100,000"),
        ({"data": b"x" * 300_001, **RAW}, 413, "300,001 bytes; at most 300,000"),
        ({"data": b"a,b", "content_type": "text/csv"}, 415, "'text/csv' is not accepted"),
        ({"json": {}}, 400, "exactly one of"),
        ({"json": {"image": "AAAA", "images": []}}, 400, "exactly one of"),
        ({"json": {"images": []}}, 400, "'images' in the JSON body is empty"),
        ({"json": {"images": ["AAAA"] * 5}}, 413, "more than 4 images"),
        ({"json": {"image": "not base64!"}}, 422, "not base64"),
        ({"json": {"image": "ü"}}, 422, "not base64"),
        ({"json": {"url": "http://127.0.0.1/x.png"}}, 400, "url"),
        ({"json": [1]}, 400, "JSON body"),
        ({"data": b"[" * 5000, "content_type": "application/json"}, 400, "JSON body"),
        ({"data": b'{"image": NaN}', "content_type": "application/json"}, 400, "JSON body"),
        ({"data": b"\xff", "content_type": "application/json"}, 400, "JSON body"),
        (parts(), 400, "no part named 'image'"),
        (parts(*[b"x"] * 5), 413, "more than 4 images"),
        ({"data": b"x", "content_type": "multipart/form-data"}, 400, "has no boundary"),
        ({"data": b"x", "content_type": "multipart/form-data; boundary=b"}, 400, "cannot be read"),
    ],
)
def test_the_answer_to_a_wrong_request_says_what_is_wrong(
    ready: FlaskClient, request_arguments: dict[str, object], status: int, reason: str
) -> None:
    assert_problem(ready.post("/v1/classify", **request_arguments), status, reason)


def test_a_chunked_body_is_411(ready: FlaskClient, png: bytes) -> None:
    response = ready.post(
        "/v1/classify",
        input_stream=BytesIO(png),
        headers={"Transfer-Encoding": "chunked"},
        environ_overrides={"wsgi.input_terminated": True},
        **RAW,
    )
    assert_problem(response, 411, "Content-Length")


def test_too_many_pixels_are_413(ready: FlaskClient) -> None:
    buffer = BytesIO()
    Image.new("1", (10_000, 5_100)).save(buffer, "PNG")
    assert_problem(ready.post("/v1/classify", data=buffer.getvalue(), **RAW), 413, "51,000,000")


@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [
        (Overloaded("full"), 503, "overload"),
        (DeadlineExceeded("late"), 504, "overload"),
        (RuntimeError("secret /etc path"), 500, "server_error"),
    ],
)
def test_overloads_and_defects_have_their_status_and_outcome(
    ready: FlaskClient,
    slot: ModelSlot,
    png: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: int,
    outcome: str,
) -> None:
    def fail(*arguments: object) -> Exception:
        if isinstance(error, Overloaded):
            raise error
        return error

    step = "put" if isinstance(error, Overloaded) else "wait"
    monkeypatch.setattr(slot.require().champion.batcher, step, fail)
    response = ready.post("/v1/classify", data=png, **RAW)
    assert response.status_code == status
    assert response.get_json()["status"] == status
    assert response.headers.get("Retry-After") == ("1" if isinstance(error, Overloaded) else None)
    assert "secret" not in response.text
    logged = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(logged) == (status == 500)
    if logged:
        assert vars(logged[0])["request_id"] == response.headers["X-Request-Id"]
    metrics = ready.get("/metrics").text
    labels = f'model_name="digits",model_version="1",outcome="{outcome}",protocol="v1"'
    assert f"convoy_requests_total{{{labels}}} 1.0" in metrics


def test_a_valid_request_id_is_kept_and_another_is_replaced(ready: FlaskClient) -> None:
    for sent, kept in (("abc-1.2_3", True), ("a b", False), ("x" * 65, False), ("", False)):
        answer = ready.get("/livez", headers={"X-Request-Id": sent})
        assert (answer.headers["X-Request-Id"] == sent) is kept


def test_the_trace_id_of_traceparent_becomes_the_request_id(ready: FlaskClient, png: bytes) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"  # pragma: allowlist secret
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    response = ready.post("/v1/classify", data=png, headers=headers, **RAW)
    assert response.headers["X-Request-Id"] == trace
    broken = ready.get("/livez", headers={"traceparent": f"00-{'0' * 32}-00f067aa0ba902b7-01"})
    assert broken.headers["X-Request-Id"] != "0" * 32


def test_a_request_is_answered_by_the_version_that_it_started_with(
    ready: FlaskClient,
    slot: ModelSlot,
    deploy: Callable[..., Bundle],
    png: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = slot.require().champion
    put = old.batcher.put

    def put_after_a_new_deployment(images: Any, deadline_s: Any) -> Any:
        deploy(2, seed=1)
        assert slot.refresh()
        return put(images, deadline_s)

    monkeypatch.setattr(old.batcher, "put", put_after_a_new_deployment)
    body = ready.post("/v1/classify", data=png, **RAW).get_json()
    assert body["model"]["version"] == 1
    assert json.loads(ready.get("/v1/models").text)["models"][0]["version"] == 2
