"""``/invocations`` answers as MLflow's own scoring server does for the same version."""

import base64
import csv
import io
import json
from collections.abc import Callable
from typing import Any

import mlflow
import numpy as np
import pytest
from flask.testing import FlaskClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server

from registry.model.bundle import Bundle
from registry.store.mlflow_store import ModelStore
from service.loading.model_slot import ModelSlot
from tests.conftest import Publish
from training.data.sources import Dataset

JSON, CSV = "application/json", "text/csv"
Ask = Callable[[bytes | str, str], tuple[int, dict[str, Any]]]


@pytest.fixture
def mlflow_server(store: ModelStore, publish: Publish) -> Ask:
    """Status and JSON of MLflow's scoring server for the version that Convoy serves, too."""
    publish()
    model = mlflow.pyfunc.load_model("models:/digits/1")
    schema = model.metadata.get_input_schema()

    def ask(body: bytes | str, content_type: str) -> tuple[int, dict[str, Any]]:
        data = body.encode() if isinstance(body, str) else body
        try:
            answer = scoring_server.invocations(data, content_type, model, schema)
        except MlflowException as error:
            return error.get_http_status_code(), json.loads(error.serialize_as_json())
        is_json = answer.mimetype == JSON
        return answer.status, json.loads(answer.response) if is_json else {}

    return ask


@pytest.fixture
def ask(ready: FlaskClient) -> Ask:
    """Status and JSON of Convoy."""

    def post(body: bytes | str, content_type: str) -> tuple[int, dict[str, Any]]:
        answer = ready.post("/invocations", data=body, content_type=content_type)
        return answer.status_code, answer.get_json()

    return post


def csv_of(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def bodies(texts: list[str]) -> dict[str, tuple[str, str]]:
    """Every form of input with the same images."""
    columns = [[text] for text in texts]
    forms: dict[str, Any] = {
        "records": {"dataframe_records": [{"image": text} for text in texts]},
        "records_wide": {"dataframe_records": [{"id": 7, "image": text} for text in texts]},
        "split": {"dataframe_split": {"columns": ["image"], "data": columns}},
        "split_index": {
            "dataframe_split": {"index": [5, 9], "columns": ["image"], "data": columns}
        },
        "split_wide": {
            "dataframe_split": {"columns": ["id", "image"], "data": [[1, text] for text in texts]}
        },
        "inputs": {"inputs": texts},
        "inputs_column": {"inputs": {"image": texts}},
        "inputs_rows": {"inputs": [{"image": text} for text in texts]},
        "instances": {"instances": texts},
        "instances_rows": {"instances": [{"image": text} for text in texts]},
        "params": {"inputs": texts, "params": {"top_k": 3}},
        "further_member": {"inputs": texts, "signature": "x"},
    }
    return {
        **{name: (json.dumps(body), JSON) for name, body in forms.items()},
        "csv": (csv_of([["image"], *columns]), CSV),
        "csv_wide": (csv_of([["id", "image"], *(["1", text] for text in texts)]), CSV),
        "csv_crlf": ("image\r\n" + "\r\n".join(texts) + "\r\n\r\n", CSV),
    }


def test_every_form_is_answered_as_by_mlflows_server(
    mlflow_server: Ask, ask: Ask, few_digits: Dataset
) -> None:
    texts = [base64.b64encode(few_digits.test.encode(index)).decode() for index in (0, 1)]
    for name, (body, content_type) in bodies(texts).items():
        status, wanted = mlflow_server(body, content_type)
        assert (status, name) == (200, name)
        status, found = ask(body, content_type)
        assert (status, name) == (200, name)
        assert list(found) == list(wanted)
        for one, other in zip(found["predictions"], wanted["predictions"], strict=True):
            assert list(one) == list(other)
            assert (one["label"], one["index"]) == (other["label"], other["index"])
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)
            np.testing.assert_allclose(one["probabilities"], other["probabilities"], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "content_type", "reason"),
    [
        ("{", JSON, "not an object with one of"),
        ("[]", JSON, "not an object with one of"),
        ("", JSON, "empty"),
        ("3", JSON, "not an object with one of"),
        ('{"other": 1}', JSON, "none of the inputs"),
        ('{"inputs": ["aGk="], "instances": ["aGk="]}', JSON, "inputs and instances"),
        ('{"dataframe_records": []}', JSON, "no image"),
        ('{"dataframe_records": {"image": "aGk="}}', JSON, "cannot be read"),
        ('{"dataframe_records": [{"picture": "aGk="}]}', JSON, "no column 'image'"),
        ('{"dataframe_records": [{"image": 3}]}', JSON, "image 0 is not a string"),
        ('{"dataframe_records": [{"image": null}]}', JSON, "image 0 is not a string"),
        ('{"dataframe_records": [{"image": "%%%%"}]}', JSON, "not base64"),
        ('{"dataframe_records": [{"image": "aGk="}]}', JSON, "not a JPEG"),
        ('{"dataframe_split": {"data": [["aGk="]]}}', JSON, "no column 'image'"),
        ('{"dataframe_split": {"columns": ["image"]}}', JSON, "cannot be read"),
        ('{"dataframe_split": {"columns": ["image"], "data": [["a"]], "x": 1}}', JSON, "unknown"),
        ('{"dataframe_split": {"columns": ["image"], "data": [["a", "b"]]}}', JSON, "1 values"),
        ('{"inputs": []}', JSON, "no image"),
        ('{"inputs": 3}', JSON, "cannot be read"),
        ("picture\naGk=\n", CSV, "no column 'image'"),
        ("", CSV, "empty"),
        (b"\xff\xfe", CSV, "not a CSV table in UTF-8"),
    ],
)
def test_a_malformed_body_is_400_as_on_mlflows_server(
    mlflow_server: Ask, ask: Ask, body: str | bytes, content_type: str, reason: str
) -> None:
    assert mlflow_server(body, content_type)[0] == 400
    status, answer = ask(body, content_type)
    assert (status, answer["error_code"]) == (400, "BAD_REQUEST")
    assert reason in answer["message"]


def test_csv_may_have_blank_lines_but_not_thousands(ask: Ask, png: bytes) -> None:
    text = base64.b64encode(png).decode()
    assert ask(f"image\n\n\n{text}\n\n", CSV)[0] == 200
    status, answer = ask(f"image\n{text}\n" + "\n" * 1001, CSV)
    assert (status, "1000 blank lines" in answer["message"]) == (400, True)


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/json; charset=latin-1", "application/json; format=split"],
)
def test_another_content_type_is_415_as_on_mlflows_server(
    mlflow_server: Ask, ask: Ask, content_type: str
) -> None:
    assert mlflow_server("{}", content_type)[0] == 415
    assert ask("{}", content_type)[0] == 415


def test_a_body_without_a_content_type_is_415(ready: FlaskClient) -> None:
    assert ready.post("/invocations", data="{}").status_code == 415


def test_vertex_and_sagemaker_send_other_forms(ready: FlaskClient, png: bytes, ask: Ask) -> None:
    text = base64.b64encode(png).decode()
    wanted = ask(json.dumps({"inputs": [text]}), JSON)
    for instance in ({"b64": text}, {"image": {"b64": text}}):
        assert ask(json.dumps({"instances": [instance]}), JSON) == wanted
    for content_type in ("application/x-image", "image/png", "application/octet-stream"):
        answer = ready.post("/invocations", data=png, content_type=content_type)
        assert (answer.status_code, answer.get_json()) == wanted


def test_ping_health_and_version_answer_as_mlflows_server_does(
    client: FlaskClient, slot: ModelSlot, deploy: Callable[..., Bundle]
) -> None:
    assert client.get("/ping").status_code == client.get("/health").status_code == 503
    assert client.get("/ping").get_json() == {"status": "Unhealthy"}
    deploy(1)
    assert slot.refresh()
    assert client.get("/ping").get_json() == {"status": "Healthy"}
    assert (client.get("/health").status_code, client.get("/health").text) == (200, "\n")
    assert client.get("/version").text == mlflow.__version__


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/models/digits/invocations", 200, None),
        ("/v1/models/digits/versions/1/invocations", 200, None),
        ("/endpoints/digits/invocations", 200, None),
        ("/endpoints/other/invocations", 404, "RESOURCE_DOES_NOT_EXIST"),
        ("/v1/models/digits/aliases/champion/invocations", 200, None),
        ("/v1/models/other/invocations", 404, "RESOURCE_DOES_NOT_EXIST"),
        ("/v1/models/digits/versions/7/invocations", 404, "RESOURCE_DOES_NOT_EXIST"),
    ],
)
def test_a_path_may_name_the_model_and_the_version(
    ready: FlaskClient, png: bytes, path: str, status: int, code: str | None
) -> None:
    answer = ready.post(path, data=png, content_type="image/png")
    assert (answer.status_code, answer.get_json().get("error_code")) == (status, code)


def test_too_many_images_are_413_before_they_are_decoded(ask: Ask) -> None:
    for body in bodies(["aGk="] * 5).values():
        status, answer = ask(*body)
        assert status == 413, body
        assert "more than 4 images" in answer["message"]


def test_a_csv_table_of_many_columns_is_413_before_it_is_parsed(ask: Ask) -> None:
    status, answer = ask("image" + ",a" * 100_000 + "\n", CSV)
    assert (status, "values" in answer["message"]) == (413, True)
