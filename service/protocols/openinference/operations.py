"""The protocol's part of the OpenAPI description."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from registry.model.manifest import PreprocessSpec
from service.http.openapi import ABOUT_MODELS, BINARY, FAILURES, Body, Operation
from service.protocols.openinference.infer_response import InferAnswer, OutputTensor
from service.protocols.openinference.metadata import (
    EXTENSIONS,
    ConfigTensor,
    Duration,
    IndexEntry,
    InferenceStatistics,
    ModelConfig,
    ModelMetadata,
    ModelParameters,
    ServerMetadata,
    Statistics,
    VersionStatistics,
)
from service.protocols.openinference.tensors import TensorSpec

_NAMED = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")


class InferInput(Struct, frozen=True):
    """Encoded images (BYTES), pixels (UINT8) or normalised values (FP32).

    ``data`` is base64 for BYTES, and flat or nested numbers otherwise. It is missing if the tensor
    follows the JSON in binary form, with its size in the parameter ``binary_data_size``.
    """

    name: str
    datatype: Literal["BYTES", "UINT8", "FP32"]
    shape: Annotated[list[int], Meta(min_length=1, max_length=4)]
    data: list[Any] = []
    parameters: dict[str, Any] = {}


class InferOutput(Struct, frozen=True):
    """An output that the client wants; parameters: ``binary_data`` and ``classification``."""

    name: Literal["probabilities", "labels"]
    parameters: dict[str, Any] = {}


class InferenceRequest(Struct, frozen=True):
    """An inference request; its parameters are ``top_k`` and ``binary_data_output``."""

    inputs: Annotated[list[InferInput], Meta(min_length=1, max_length=1)]
    outputs: list[InferOutput] = []
    id: str = ""
    parameters: dict[str, Any] = {}


class Live(Struct, frozen=True):
    """Whether the process answers."""

    live: bool


class Ready(Struct, frozen=True):
    """Whether every model is loaded."""

    live: bool
    ready: bool


class ModelReady(Struct, frozen=True):
    """Whether a version is loaded."""

    name: str
    ready: bool


_BODY = Body(
    content={"application/json": InferenceRequest, "application/octet-stream": BINARY},
    command=(
        'echo "{\\"inputs\\": [{\\"name\\": \\"image\\", \\"datatype\\": \\"BYTES\\", '
        '\\"shape\\": [1], \\"data\\": [\\"$(base64 -w0 picture.png)\\"]}]}" |\n'
        "  curl -s -H 'Content-Type: application/json' -d @-"
    ),
    maker="tensor",
)
_ANSWER = InferAnswer(
    model_name="fashion",
    model_version="1",
    outputs=[
        OutputTensor("probabilities", "FP32", (1, 2), [0.0001, 0.9999]),
        OutputTensor("labels", "BYTES", (1, 1), ["Ankle boot"]),
    ],
)
_METADATA = ModelMetadata(
    name="fashion",
    versions=["1"],
    platform="convoy",
    inputs=[TensorSpec("image", "BYTES", [-1])],
    outputs=[TensorSpec("probabilities", "FP32", [-1, 2])],
    parameters=ModelParameters(
        labels=("Sneaker", "Ankle boot"),
        preprocess=PreprocessSpec(mode="L", width_px=28, height_px=28, mean=(0.286,), std=(0.353,)),
        alias="champion",
        plan="openvino-fp32",
        device="cpu",
    ),
)
_CONFIG = ModelConfig(
    name="fashion",
    platform="convoy",
    backend="convoy",
    max_batch_size=32,
    version_policy={"specific": {"versions": [1]}},
    input=[ConfigTensor("image", "TYPE_STRING", [1], optional=True)],
    output=[ConfigTensor("probabilities", "TYPE_FP32", [2])],
    dynamic_batching={},
    parameters={"plan": {"string_value": "openvino-fp32"}},
)
_STATISTICS = Statistics(
    [
        VersionStatistics(
            name="fashion",
            version="1",
            inference_count=120,
            execution_count=80,
            inference_stats=InferenceStatistics(
                success=Duration(120, 310_000_000),
                fail=Duration(),
                queue=Duration(120, 20_000_000),
                compute_input=Duration(120, 60_000_000),
                compute_infer=Duration(80, 90_000_000),
                compute_output=Duration(120, 9_000_000),
            ),
        )
    ]
)

OPERATIONS: tuple[Operation, ...] = (
    *(
        Operation(
            method="post",
            path=f"{path}/infer",
            summary="Classify by the Open Inference Protocol: encoded images or tensors.",
            answer=InferAnswer,
            example=_ANSWER,
            body=_BODY,
            failures=FAILURES,
        )
        for path in _NAMED
    ),
    Operation(
        path="/v2",
        summary="The server, and the extensions of the Open Inference Protocol that it supports.",
        answer=ServerMetadata,
        example=ServerMetadata("convoy", "0.1.0", EXTENSIONS),
    ),
    Operation(
        path="/v2/health/live",
        summary="Whether the process answers.",
        answer=Live,
        example=Live(live=True),
    ),
    Operation(
        path="/v2/health/ready",
        summary="Whether every model is loaded and warmed up.",
        answer=Ready,
        example=Ready(live=True, ready=True),
        failure_answers=("503",),
    ),
    *(
        Operation(
            path=f"{path}{suffix}",
            summary=summary,
            answer=answer,
            example=example,
            failures=ABOUT_MODELS,
        )
        for path in _NAMED
        for suffix, summary, answer, example in (
            ("", "One version: tensors, labels, preprocessing.", ModelMetadata, _METADATA),
            (
                "/ready",
                "Whether the version is loaded.",
                ModelReady,
                ModelReady("fashion", ready=True),
            ),
            ("/config", "The version's configuration, as Triton has it.", ModelConfig, _CONFIG),
            ("/stats", "Counts and times of the version.", Statistics, _STATISTICS),
        )
    ),
    Operation(
        path="/v2/models/stats",
        summary="Counts and times of all versions since the service started.",
        answer=Statistics,
        example=_STATISTICS,
        failures=ABOUT_MODELS,
    ),
    Operation(
        method="post",
        path="/v2/repository/index",
        summary="The versions that serve, and the models for which none does.",
        answer=list[IndexEntry],
        example=[IndexEntry("fashion", "1", "READY")],
        failures=ABOUT_MODELS,
    ),
)
