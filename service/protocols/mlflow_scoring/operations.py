"""The protocol's records, and its part of the OpenAPI description."""

from typing import Any

from msgspec import Struct

from service.http.openapi import BINARY, FAILURES, Body, Operation


class ScoringInput(Struct, frozen=True, omit_defaults=True):
    """Exactly one of the members before ``params``, with images as base64.

    ``dataframe_records`` has rows such as {"image": "…"}. ``dataframe_split`` has the members
    columns and data. ``inputs`` and ``instances`` have strings, or objects with the member image or
    b64. Convoy ignores ``params``.
    """

    dataframe_records: list[dict[str, Any]] | None = None
    dataframe_split: dict[str, Any] | None = None
    inputs: Any = None
    instances: Any = None
    params: dict[str, Any] | None = None


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


class Health(Struct, frozen=True):
    """The state of the service, "Healthy" or "Unhealthy"."""

    status: str


_BODY = Body(
    content={
        "application/json": ScoringInput,
        "text/csv": {"type": "string"},
        "application/x-image": BINARY,
    },
    command=(
        'echo "{\\"inputs\\": [\\"$(base64 -w0 picture.png)\\"]}" |\n'
        "  curl -s -H 'Content-Type: application/json' -d @-"
    ),
    maker="scoring",
)
_PREFIXES = (
    "",
    "/endpoints/{name}",
    "/v1/models/{name}",
    "/v1/models/{name}/versions/{version}",
    "/v1/models/{name}/aliases/{alias}",
)

OPERATIONS: tuple[Operation, ...] = (
    *(
        Operation(
            method="post",
            path=f"{prefix}/invocations",
            summary="Classify as MLflow's scoring server does, from base64 in JSON or CSV.",
            answer=Predictions,
            example=Predictions([ScoredImage("Ankle boot", 1, 0.9999, [0.0001, 0.9999])]),
            body=_BODY,
            failures=FAILURES,
        )
        for prefix in _PREFIXES
    ),
    Operation(
        path="/ping",
        summary="Whether the service is ready, for MLflow's, TorchServe's and SageMaker's clients.",
        answer=Health,
        example=Health("Healthy"),
        failure_answers=("503",),
    ),
    Operation(
        path="/health",
        summary="Whether the service is ready.",
        example="\n",
        failure_answers=("503",),
    ),
    Operation(
        path="/version",
        summary="The version of MLflow whose scoring protocol this is.",
        example="3.17.2",
    ),
)
