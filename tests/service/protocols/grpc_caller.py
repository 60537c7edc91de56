"""``Caller``: calls the Open Inference Protocol over gRPC, for tests of servers and containers."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from service.protocols.grpc_v2 import inference_pb2 as pb
from tests.conftest import WAIT_TIMEOUT_S

SERVICE = "inference.GRPCInferenceService"


class Caller:
    """Calls the server by the names of its calls, as any client would."""

    def __init__(self, port: int, credentials: grpc.ChannelCredentials | None = None) -> None:
        self.address = address = f"127.0.0.1:{port}"
        self._channel = (
            grpc.secure_channel(address, credentials)
            if credentials
            else grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        )

    def call(
        self, name: str, message: Message, service: str = SERVICE, **metadata: str
    ) -> tuple[Any, dict[str, str]]:
        """The answer, and the metadata that came with it."""
        kinds = {"ModelInfer": pb.ModelInferResponse, "Check": health_pb2.HealthCheckResponse}
        kind: Any = kinds.get(name) or getattr(pb, f"{name}Response")
        send: Any = self._channel.unary_unary(
            f"/{service}/{name}",
            request_serializer=lambda each: each.SerializeToString(),
            response_deserializer=kind.FromString,
        )
        pairs = [(key.replace("_", "-"), value) for key, value in metadata.items()]
        answer, call = send.with_call(message, timeout=WAIT_TIMEOUT_S, metadata=pairs)
        return answer, {key: str(value) for key, value in call.trailing_metadata() or ()}

    def begin(
        self,
        name: str,
        messages: Iterator[bytes],
        metadata: tuple[tuple[str, str], ...] = (),
        service: str = SERVICE,
    ) -> Any:
        """A call whose messages are sent as ``messages`` yields them."""
        send: Any = self._channel.stream_unary(f"/{service}/{name}")
        return send.future(messages, timeout=WAIT_TIMEOUT_S, metadata=metadata)

    def compressing(self, name: str) -> Any:
        """A function that sends its message compressed."""
        address = self.address
        channel = grpc.insecure_channel(address, compression=grpc.Compression.Gzip)
        return channel.unary_unary(f"/{SERVICE}/{name}")

    def infer(self, message: pb.ModelInferRequest, **metadata: str) -> pb.ModelInferResponse:
        answer: pb.ModelInferResponse = self.call("ModelInfer", message, **metadata)[0]
        return answer

    def refusal(self, name: str, message: Message, **metadata: str) -> tuple[str, str]:
        """The status and the details of a call that fails."""
        with pytest.raises(grpc.RpcError) as raised:
            self.call(name, message, **metadata)
        error: Any = raised.value
        return error.code().name, error.details()

    def close(self) -> None:
        self._channel.close()


def request(
    datatype: str = "BYTES", shape: tuple[int, ...] = (1,), raw: bytes | None = None, **more: Any
) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=more.pop("model", "digits"), **more)
    message.inputs.add(name="x", datatype=datatype, shape=shape)
    if raw is not None:
        message.raw_input_contents.append(raw)
    return message
