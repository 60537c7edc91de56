"""What a ``ModelInferRequest`` may contain before protobuf parses it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.core.errors import InvalidTensor
from service.protocols.grpc_v2 import inference_pb2 as pb
from service.protocols.grpc_v2.message_size import MAX_HEAD_BYTES, check_infer_request

MIB = 2**20


def encoded(**contents: Any) -> bytes:
    """A message with typed contents."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 3, 8, 8])
    tensor.contents.CopyFrom(pb.InferTensorContents(**contents))
    return pb.ModelInferRequest(model_name="digits", id="7", inputs=[tensor]).SerializeToString()


@pytest.mark.parametrize(
    "message",
    [
        pb.ModelInferRequest(model_name="digits").SerializeToString(),
        pb.ModelInferRequest(raw_input_contents=[bytes(2 * MIB)] * 4).SerializeToString(),
        encoded(bytes_contents=[bytes(MIB)] * 4),
        encoded(fp32_contents=[0.5] * 1000),
        encoded(uint_contents=[300] * 1000),
    ],
)
def test_images_and_tensors_may_be_large(message: bytes) -> None:
    check_infer_request(message, MIB)


@pytest.mark.parametrize(
    "message",
    [
        b"\x2a\x00" * MAX_HEAD_BYTES,  # inputs that are empty
        b"\x3a\x00" * MAX_HEAD_BYTES,  # raw contents that are empty
        b"\x22\x00" * MAX_HEAD_BYTES,  # parameters
        b"\xfa\x06\x00" * MAX_HEAD_BYTES,  # a member that the message does not have
        pb.ModelInferRequest(model_name="x" * MAX_HEAD_BYTES).SerializeToString(),
        pb.ModelInferRequest(
            inputs=[pb.ModelInferRequest.InferInputTensor(shape=[1] * MAX_HEAD_BYTES)]
        ).SerializeToString(),
        encoded(fp32_contents=[0.5] * MIB),
        encoded(bytes_contents=[b""] * MIB),
    ],
)
def test_anything_else_over_its_limit_is_refused(message: bytes) -> None:
    with pytest.raises(InvalidTensor, match="not image data"):
        check_infer_request(message, MIB)


@given(st.binary(max_size=60))
def test_any_bytes_are_accepted_or_refused(message: bytes) -> None:
    try:
        check_infer_request(message, MIB)
    except InvalidTensor:
        return
    assert len(message) <= MAX_HEAD_BYTES


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**29 - 1), st.binary(max_size=50))
def test_members_of_all_encodings_are_skipped_whole(value: int, number: int, text: bytes) -> None:
    def varint(each: int) -> bytes:
        found = bytearray()
        while each > 0x7F:
            found.append(each & 0x7F | 0x80)
            each >>= 7
        return bytes([*found, each])

    fields = [
        varint(number << 3) + varint(value),
        varint(number << 3 | 1) + bytes(8),
        varint(number << 3 | 5) + bytes(4),
        varint(3 << 3 | 2) + varint(len(text)) + text,
    ]
    check_infer_request(b"".join(fields), MIB)
    for cut in (*fields[:3], *([fields[3]] if text else [])):
        with pytest.raises(InvalidTensor, match="not a ModelInferRequest"):
            check_infer_request(cut[:-1], MIB)
