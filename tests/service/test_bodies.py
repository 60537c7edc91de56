"""Reading bodies: limits are checked before the work, and every usual form is accepted."""

import base64
import gc
import gzip
import json
import weakref
from io import BytesIO
from typing import Any

import msgspec
import pybase64
import pytest
from flask.testing import FlaskClient
from werkzeug.test import EnvironBuilder, TestResponse

from service.http.bodies import body_images
from service.http.bodies.form import CHUNK_BYTES, EPILOGUE_BYTES
from service.inference import pipeline
from service.server.protocol import IN_LOOP, Postpone
from tests.service.conftest import Head

JSON = "application/json"
FORM = "multipart/form-data; boundary=b"


class Untouched(BytesIO):
    """A body that fails the test if it is read."""

    def read(self, size: int | None = -1) -> bytes:
        raise AssertionError("the body was read")


class Counted(BytesIO):
    """A body that records up to which byte it was read."""

    def read(self, size: int | None = -1) -> bytes:
        self.taken = self.tell() + (size or 0)
        return super().read(size)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def part(name: str, data: bytes, *headers: str) -> bytes:
    head = "".join(f"{line}\r\n" for line in headers)
    return (
        (
            f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n{head}\r\n'
        ).encode()
        + data
        + b"\r\n"
    )


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b--\r\n"


def post(client: FlaskClient, body: bytes, content_type: str, **headers: str) -> TestResponse:
    return client.post(
        "/v1/classify?top_k=1", data=body, content_type=content_type, headers=headers
    )


def send(client: FlaskClient, stream: BytesIO, length: int, content_type: str) -> TestResponse:
    """The answer to a request with the body ``stream`` and the Content-Length ``length``."""
    environ = {
        "CONTENT_LENGTH": str(length),
        "CONTENT_TYPE": content_type,
        "wsgi.input": stream,
    }
    return client.post("/v1/classify", environ_overrides=environ)


def test_a_json_body_over_its_own_limit_is_refused_by_its_length(ready: FlaskClient) -> None:
    length = 64 * 1024 * 1024
    response = send(ready, Untouched(), length, JSON)
    assert response.status_code == 413
    assert "multipart/form-data" in response.get_json()["detail"]


@pytest.mark.parametrize("value", [1, None, [], {"a": "b"}])
def test_json_with_too_many_values_is_refused_before_decoding(
    ready: FlaskClient, monkeypatch: pytest.MonkeyPatch, value: object
) -> None:
    def decode(*arguments: object, **named: object) -> None:
        raise AssertionError("the body was decoded")

    monkeypatch.setattr(msgspec.json, "decode", decode)
    response = post(ready, json.dumps({"images": [value] * 20_000}).encode(), JSON)
    assert response.status_code == (413 if isinstance(value, dict) else 400)
    reason = "more than 4 images" if isinstance(value, dict) else "too many values"
    assert reason in response.get_json()["detail"]


def test_json_with_too_many_strings_or_escapes_is_refused_before_decoding(
    ready: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*arguments: object, **named: object) -> None:
        raise AssertionError("the body was decoded")

    monkeypatch.setattr(msgspec.json, "decode", decode)
    response = post(ready, json.dumps({"images": ["ab"] * 30_000}).encode(), JSON)
    assert response.status_code == 413
    assert "more than 4 images" in response.get_json()["detail"]
    response = post(ready, b'{"image": "' + rb"\n" * 50_000 + b'"}', JSON)
    assert response.status_code == 400
    assert "escapes" in response.get_json()["detail"]


def test_base64_of_an_image_over_the_limit_is_not_decoded(
    ready: FlaskClient, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*arguments: object, **named: object) -> None:
        raise AssertionError("the text was decoded")

    monkeypatch.setattr(pybase64, "b64decode", decode)
    response = post(ready, json.dumps({"image": "A" * 140_000}).encode(), JSON)
    assert response.status_code == 413
    assert "105,000 bytes; at most 100,000" in response.get_json()["detail"]


def test_a_request_may_have_as_many_data_urls_as_images(ready: FlaskClient, png: bytes) -> None:
    text = "data:image/png;base64," + b64(png)
    response = post(ready, json.dumps({"image": None, "images": [text] * 4}).encode(), JSON)
    assert response.status_code == 200
    assert len(response.get_json()["results"]) == 4
    assert post(ready, json.dumps({"images": [text] * 5}).encode(), JSON).status_code == 413


@pytest.mark.parametrize("body", [b"no image", b'{"images": ["QUJD", "QUJE"]}', b'{"images": 3}'])
def test_a_body_is_freed_with_its_answer(ready: FlaskClient, body: bytes) -> None:
    kind = JSON if body.startswith(b"{") else "image/png"
    stream = Counted(body)
    is_freed = weakref.ref(stream)
    environ = EnvironBuilder("/v1/classify", method="POST", content_type=kind).get_environ()
    environ |= {"wsgi.input": stream, "CONTENT_LENGTH": str(len(body))}
    del stream
    gc.collect()
    gc.disable()
    try:
        answer = b"".join(ready.application.wsgi_app(environ, Head()))
        assert b"error" in answer
        del environ
        assert is_freed() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["note", "image"])
def test_reading_stops_at_too_many_parts_of_a_form(ready: FlaskClient, name: str) -> None:
    body = Counted(part(name, b"") * 3000)
    response = send(ready, body, len(body.getvalue()), FORM)
    assert response.status_code == 413
    assert "more than" in response.get_json()["detail"]
    assert body.taken <= CHUNK_BYTES + EPILOGUE_BYTES


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (form(part("note", bytes(290_000))), 413, "262,144 bytes outside of images"),
        (form(part("image", b"", "X-Long: " + "x" * 5000)), 413, "header length"),
        (form(part("image", b"", *[f"X-{n}: x" for n in range(9)])), 413, "header count"),
        (form(part("image", b"", "X-Folded: x", " x")), 400, "continuation"),
        (bytes(100_000) + form(part("image", b"")), 400, "Boundary not found"),
        (form(part("image", b"x")) + bytes(100_000), 400, "after end"),
    ],
)
def test_bytes_and_headers_around_the_images_of_a_form_are_limited(
    ready: FlaskClient, body: bytes, status: int, reason: str
) -> None:
    response = post(ready, body, FORM)
    assert response.status_code == status
    assert reason in response.get_json()["detail"]


@pytest.mark.parametrize("size", range(65_200, 65_560, 13))
def test_the_end_of_a_form_may_be_at_the_end_of_a_chunk(ready: FlaskClient, size: int) -> None:
    body = form(part("image", b"\x89PNG\r\n\x1a\n" + bytes(size)))
    assert post(ready, body, FORM).status_code == 422  # it was read, but it is not an image


def test_slow_parsing_in_the_loop_postpones_a_request_as_slow_decoding_does(
    ready: FlaskClient, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_in_loop(body: bytes, content_type: str) -> int:
        environ = {IN_LOOP: len(body)}
        answer = ready.post(
            "/v1/classify", data=body, content_type=content_type, environ_overrides=environ
        )
        return answer.status_code

    for limit in ("LOOP_IMAGE_MS", "LOOP_DECODE_S"):
        monkeypatch.setattr(pipeline, limit, 1e9)  # a busy machine may be slow
    monkeypatch.setattr(body_images, "LOOP_PARSE_S", 1e9)
    empty_parts = form(*[part("note", b"")] * 6, part("image", png))
    assert send_in_loop(empty_parts, FORM) == send_in_loop(png, "image/png") == 200
    monkeypatch.setattr(body_images, "LOOP_PARSE_S", 0.0)
    with pytest.raises(Postpone):
        send_in_loop(empty_parts, FORM)
    monkeypatch.setattr(pipeline, "LOOP_DECODE_S", 0.0)  # reading alone takes longer
    with pytest.raises(Postpone):
        send_in_loop(png, "image/png")


@pytest.mark.parametrize(
    "write",
    [
        lambda image: base64.encodebytes(image).decode(),
        lambda image: "\r\n".join(b64(image)[at : at + 76] for at in range(0, 9999, 76)),
        lambda image: b64(image) + "\n",
        lambda image: "data:image/png;base64," + b64(image),
        lambda image: "DATA:;charset=x;base64," + b64(image),
        lambda image: base64.urlsafe_b64encode(image).decode(),
        lambda image: b64(image).rstrip("="),
    ],
    ids=["lines of 76", "CRLF", "newline", "data URL", "bare data URL", "URL-safe", "unpadded"],
)
def test_all_usual_forms_of_base64_are_accepted(ready: FlaskClient, png: bytes, write: Any) -> None:
    for image in (
        png,
        png + b"\xfb",
        png + b"\xfb\xff",
    ):  # each padding, and the characters that differ in the URL-safe alphabet
        response = post(ready, json.dumps({"image": write(image)}).encode(), JSON)
        assert response.status_code == 200


def test_escaped_slashes_in_json_are_accepted(ready: FlaskClient, png: bytes) -> None:
    text = b64(png).replace("/", r"\/").replace("+", r"\u002b")
    assert post(ready, f'{{"image": "{text}"}}'.encode(), JSON).status_code == 200


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("not base64!", "not base64"),
        ("AAAAA", "not base64"),
        ("AA=A", "not base64"),
        ("data:image/png,AAAA", "'data:image/png', not with 'data:…;base64,'"),
        ("data:" + "x" * 200, "not with 'data:…;base64,'"),
    ],
)
def test_text_that_is_not_base64_is_422_with_the_reason(
    ready: FlaskClient, text: str, reason: str
) -> None:
    response = post(ready, json.dumps({"image": text}).encode(), JSON)
    assert response.status_code == 422
    assert reason in response.get_json()["detail"]


@pytest.mark.parametrize("given", [{"image": 1}, {"images": ["QUJD", None]}, {"images": [["a"]]}])
def test_an_image_that_is_not_a_string_fails_the_whole_body(
    ready: FlaskClient, given: object
) -> None:
    response = post(ready, json.dumps(given).encode(), JSON)
    assert response.status_code == 400
    assert "not a string" in response.get_json()["detail"]


def test_json_may_begin_with_a_byte_order_mark(ready: FlaskClient, png: bytes) -> None:
    body = b"\xef\xbb\xbf" + json.dumps({"image": b64(png)}).encode()
    assert post(ready, body, JSON).status_code == 200


@pytest.mark.parametrize(
    "name", ["image", "images", "image[]", "images[]", "images[0]", "file", "files", "file[]"]
)
def test_a_form_may_use_any_usual_name_for_its_images(
    ready: FlaskClient, png: bytes, name: str
) -> None:
    assert post(ready, form(part(name, png)), FORM).status_code == 200


@pytest.mark.parametrize("written", ["{}", '"{}"', "{}; charset=utf-8"])
def test_a_boundary_may_have_any_characters(ready: FlaskClient, png: bytes, written: str) -> None:
    boundary = "----=_Part_0_1.2"
    body = form(part("image", png)).replace(b"--b", f"--{boundary}".encode())
    kind = f"Multipart/Form-Data;Boundary={written.format(boundary)}"
    environ = {"CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": kind, "wsgi.input": BytesIO(body)}
    assert ready.post("/v1/classify", environ_overrides=environ).status_code == 200


def test_the_content_type_of_object_stores_is_accepted_as_an_image(
    ready: FlaskClient, png: bytes
) -> None:
    assert post(ready, png, "binary/octet-stream").status_code == 200


def test_a_compressed_body_is_415_and_accept_encoding_says_what_is_accepted(
    ready: FlaskClient, png: bytes
) -> None:
    headers = {"Content-Encoding": "gzip"}
    for body, kind in ((png, "image/png"), (json.dumps({"image": b64(png)}).encode(), JSON)):
        response = post(ready, gzip.compress(body), kind, **headers)
        assert response.status_code == 415
        assert "Content-Encoding 'gzip'" in response.get_json()["detail"]
        assert response.headers["Accept-Encoding"] == "identity"
    assert post(ready, png, "image/png", **{"Content-Encoding": "identity"}).status_code == 200
