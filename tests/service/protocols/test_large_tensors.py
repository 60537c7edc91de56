"""Numbers of tensors in JSON that are read in several slices."""

from typing import Any

import numpy as np
import pytest
from werkzeug.test import EnvironBuilder

from registry.core.errors import InvalidTensor
from service.protocols.openinference.infer_request import NUMBERS_BYTES, InferRequest
from service.settings import Settings
from tests.service.protocols.tensors import in_json

SHAPE = [2, 100, 300, 3]
PLACE = 100_000  # of a value in a later slice than the first
LEVELS = np.random.default_rng(7).integers(0, 256, SHAPE)


def images_of(datatype: str, data: Any) -> list[Any]:
    arguments = in_json(datatype, SHAPE, data)
    assert len(arguments["data"]) > 10 * NUMBERS_BYTES
    builder = EnvironBuilder(method="POST", **arguments)
    return list(InferRequest(builder.get_environ(), Settings()))


def test_every_value_of_a_large_tensor_keeps_its_place() -> None:
    np.testing.assert_array_equal(images_of("UINT8", LEVELS.tolist()), LEVELS.astype(np.uint8))
    numbers = np.random.default_rng(8).standard_normal(SHAPE, np.float32)
    np.testing.assert_array_equal(images_of("FP32", numbers.ravel().tolist()), numbers)


def test_pixels_may_be_written_with_a_point() -> None:
    levels: list[float] = [
        float(each) if place == PLACE else each
        for place, each in enumerate(LEVELS.ravel().tolist())
    ]
    np.testing.assert_array_equal(images_of("UINT8", levels), LEVELS.astype(np.uint8))


@pytest.mark.parametrize(
    ("datatype", "value", "text"),
    [
        ("UINT8", 256, "0 to 255"),
        ("UINT8", -1, "0 to 255"),
        ("UINT8", 0.5, "0 to 255"),
        ("UINT8", 10**30, "0 to 255"),
        ("UINT8", 10**400, "0 to 255"),
        ("UINT8", "7", "not a number"),
        ("FP32", None, "not a number"),
        ("FP32", True, "not a number"),
        ("FP32", [], "not a number"),
        ("FP32", {}, "not a number"),
    ],
)
def test_one_value_that_does_not_fit_fails_the_tensor(datatype: str, value: Any, text: str) -> None:
    values = LEVELS.ravel().tolist()
    values[PLACE] = value
    with pytest.raises(InvalidTensor, match=text):
        images_of(datatype, values)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_value_too_few_or_too_many_is_counted_before_the_values_are_read(change: int) -> None:
    values = [*LEVELS.ravel().tolist(), 0][: LEVELS.size + change]
    with pytest.raises(InvalidTensor, match=rf"{LEVELS.size + change:,} values.* 180,000"):
        images_of("UINT8", values)


def test_an_empty_list_in_the_last_place_does_not_stand_for_a_value() -> None:
    values = [*LEVELS.ravel().tolist()[:-1], []]
    with pytest.raises(InvalidTensor):
        images_of("UINT8", values)
