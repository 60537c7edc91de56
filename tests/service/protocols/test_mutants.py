"""Mutated requests get an answer of their protocol, never a server error."""

import base64
import time
from collections import Counter
from typing import Any

import pytest
from flask.testing import FlaskClient

from registry.model.image.decode import decode_image
from tests.hostile_tensors import Posted, mutants, seeds
from tests.service.protocols.tensors import normalised
from training.data.sources import Dataset


@pytest.fixture
def good(few_digits: Dataset, png: bytes) -> list[Posted]:
    pixels = decode_image(png, few_digits.preprocess)[None]
    floats = normalised(pixels, few_digits.preprocess)
    text = base64.b64encode(png).decode()
    return seeds(png, text, pixels.tobytes(), floats.tobytes(), 8)


def send(client: FlaskClient, request: Posted) -> Any:
    headers = {"Inference-Header-Content-Length": request.head_bytes} if request.head_bytes else {}
    return client.post(
        request.path, data=request.body, content_type=request.content_type, headers=headers
    )


def test_the_requests_that_are_mutated_are_good(ready: FlaskClient, good: list[Posted]) -> None:
    assert {send(ready, each).status_code for each in good} == {200}


@pytest.mark.parametrize("count", [1_500, pytest.param(100_000, marks=pytest.mark.torture)])
def test_no_mutant_gets_a_server_error(ready: FlaskClient, good: list[Posted], count: int) -> None:
    statuses: Counter[int] = Counter()
    slowest_s = 0.0
    for each in mutants(good, count):
        began = time.perf_counter()
        answer = send(ready, each)
        slowest_s = max(slowest_s, time.perf_counter() - began)
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, each
        if answer.status_code != 200:
            assert answer.get_json().get("error" if "/v2/" in each.path else "error_code"), each
    print(f"{count} mutants: {dict(statuses)}, the slowest {1000 * slowest_s:.1f} ms")
    assert statuses[400] > count / 3
    assert statuses[200] > count / 100
