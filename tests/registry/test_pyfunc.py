import base64

import mlflow
import numpy as np
import pandas as pd
import pytest

from registry.core.errors import InvalidImage
from registry.model.mlflow_pyfunc import _load_pyfunc
from registry.promotion.promotion import promote
from registry.store.mlflow_store import ModelStore
from tests.conftest import MakeBundle, Publish, load_eager
from training.data.sources import Dataset


def test_mlflow_gives_the_classifiers_probabilities(
    store: ModelStore, publish: Publish, make_bundle: MakeBundle, few_digits: Dataset
) -> None:
    publish()
    promote(store, "digits", 1)
    model = mlflow.pyfunc.load_model("models:/digits@champion")
    images = [few_digits.test.encode(index) for index in range(5)]
    frame = model.predict(pd.DataFrame({"image": images}))
    expected = load_eager(make_bundle()).classify(few_digits.test.pixels[:5])
    np.testing.assert_allclose(np.array(frame["probabilities"].tolist()), expected, atol=1e-5)
    assert frame["label"].tolist() == [str(index) for index in expected.argmax(axis=1)]
    np.testing.assert_allclose(frame["probability"], expected.max(axis=1), atol=1e-5)


def test_bytes_base64_and_plain_sequences_are_accepted(make_bundle: MakeBundle, png: bytes) -> None:
    model = _load_pyfunc(str(make_bundle().folder))
    text = base64.b64encode(png).decode()
    answers = [
        model.predict([png]),
        model.predict(pd.DataFrame({"anything": [text]})),
        model.predict(pd.Series([bytearray(png)])),
    ]
    assert len({answer["probability"][0] for answer in answers}) == 1


@pytest.mark.parametrize("bad", ["no base64!", b"no image"])
def test_the_error_for_a_bad_image_has_its_position(
    make_bundle: MakeBundle, png: bytes, bad: object
) -> None:
    model = _load_pyfunc(str(make_bundle().folder))
    with pytest.raises(InvalidImage, match="image 1: "):
        model.predict([png, bad])
