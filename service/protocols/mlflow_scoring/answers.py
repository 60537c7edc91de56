"""The bodies of the answers of MLflow's scoring protocol."""

from msgspec import Struct


class ScoredImage(Struct, frozen=True):
    """One row of an answer; ``probabilities`` are in the order of the version's labels."""

    label: str
    index: int
    probability: float
    probabilities: list[float]


class Predictions(Struct, frozen=True):
    """The body of an answer: one row for each image, in the order of the request."""

    predictions: list[ScoredImage]


class ScoringError(Struct, frozen=True):
    """The body of an error."""

    error_code: str
    message: str
    request_id: str
