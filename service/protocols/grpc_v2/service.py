"""``InferenceService``: the calls of the protocol's gRPC service."""

from collections.abc import Callable
from typing import Any, TypeVar

import grpc
import msgspec
from google.protobuf import json_format
from google.protobuf.message import Message

from registry.auth.tokens import Right
from service.http.health import readiness
from service.inference.requests import Job, Request, Result
from service.protocols.grpc_v2 import inference_pb2 as pb
from service.protocols.grpc_v2.calls import PROTOCOL, SERVICE, Call
from service.protocols.grpc_v2.infer import InferImages
from service.protocols.grpc_v2.turns import Turns
from service.protocols.openinference.metadata import (
    Statistics,
    index,
    model_config,
    model_metadata,
    server_metadata,
    statistics,
)
from service.protocols.openinference.protocol import target
from service.state import State

AnyMessage = TypeVar("AnyMessage", bound=Message)


class InferenceService:
    """The calls. It has many methods because each call of the protocol is one of them."""

    def __init__(self, state: State, turns: Turns) -> None:
        """Answer with the models of ``state``; inference takes ``turns``."""
        self._state = state
        self._turns = turns
        self.ending = False
        """Whether the worker ends soon; clients then see that the server is not ready."""

    def handlers(self) -> grpc.GenericRpcHandler:
        """The calls by name, for ``grpc.Server.add_generic_rpc_handlers``."""
        # Name → the call, the class of its request, and the rights of which its token needs one.
        calls: dict[str, tuple[Callable[..., Message], Any, tuple[Right, ...]]] = {
            "ServerLive": (self._server_live, pb.ServerLiveRequest, ()),
            "ServerReady": (self._server_ready, pb.ServerReadyRequest, ()),
            "ServerMetadata": (self._server_metadata, pb.ServerMetadataRequest, ()),
            "ModelReady": (self._model_ready, pb.ModelReadyRequest, ()),
            "ModelMetadata": (
                self._model_metadata,
                pb.ModelMetadataRequest,
                ("view", "classify"),
            ),
            "ModelConfig": (self._model_config, pb.ModelConfigRequest, ("view", "classify")),
            "ModelStatistics": (self._model_statistics, pb.ModelStatisticsRequest, ("view",)),
            "RepositoryIndex": (self._repository_index, pb.RepositoryIndexRequest, ("view",)),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._guarded(name, call, rights),
                request_deserializer=request.FromString,
                response_serializer=_serialized,
            )
            for name, (call, request, rights) in calls.items()
        }
        handlers["ModelInfer"] = grpc.unary_unary_rpc_method_handler(
            self._model_infer,
            request_deserializer=pb.ModelInferRequest.FromString,
            response_serializer=_serialized,
        )
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    @property
    def is_ready(self) -> bool:
        """Whether this worker can answer."""
        return readiness(self._state, self.ending).ready

    def _guarded(
        self, name: str, call: Callable[[Any], Message], rights: tuple[Right, ...]
    ) -> Callable[[Any, grpc.ServicerContext], Message]:
        """``call`` for clients with one of the ``rights``, with errors as gRPC has them."""

        def answer(message: Any, context: grpc.ServicerContext) -> Message:
            current = Call(name, context, self._state.recorder)
            try:
                self._state.access_control.admit_with(current.environ, rights)
                found = call(message)
            except Exception as error:  # noqa: BLE001 - the edge of a call
                current.fail(error, message)
            current.succeed(message, found)
            return found

        return answer

    def _model_infer(
        self, message: pb.ModelInferRequest, context: grpc.ServicerContext
    ) -> pb.ModelInferResponse:
        state = self._state
        current = Call("ModelInfer", context, state.recorder)
        images = InferImages(message, state.settings)
        try:
            state.access_control.admit(current.environ)
            wanted = images.wanted()

            def write(result: Result) -> pb.ModelInferResponse:
                return images.answer(result, wanted)

            with self._turns:
                current.job = self._job(message, images, current)
                state.pipeline.submit(current.job)
                answer = state.pipeline.finish(current.job, write)
        except Exception as error:  # noqa: BLE001 - the edge of a call
            served = current.job.served if current.job else None
            version = served.version if served else None
            state.pipeline.refuse(message.model_name or None, version, PROTOCOL, error)
            current.fail(error, message)
        current.succeed(message, answer)
        return answer

    def _job(
        self,
        message: pb.ModelInferRequest,
        images: InferImages,
        current: Call,
    ) -> Job:
        wanted = target(message.model_name, message.model_version)
        session = self._state.settings.sticky_header.upper().replace("-", "_")
        return Job(
            Request(
                images=images,
                protocol=PROTOCOL,
                name=wanted.name or None,
                version=wanted.version,
                alias=wanted.alias,
                session=current.environ.get(f"HTTP_{session}"),
                waiting=self._turns.waiting,
                started=current.started,
            )
        )

    def _server_live(self, message: pb.ServerLiveRequest) -> Message:
        return pb.ServerLiveResponse(live=True)

    def _server_ready(self, message: pb.ServerReadyRequest) -> Message:
        return pb.ServerReadyResponse(ready=self.is_ready)

    def _server_metadata(self, message: pb.ServerMetadataRequest) -> Message:
        return _message(server_metadata(), pb.ServerMetadataResponse())

    def _model_ready(self, message: pb.ModelReadyRequest) -> Message:
        self._find(message)
        return pb.ModelReadyResponse(ready=not self.ending)

    def _model_metadata(self, message: pb.ModelMetadataRequest) -> Message:
        return _message(model_metadata(*self._find(message)), pb.ModelMetadataResponse())

    def _model_config(self, message: pb.ModelConfigRequest) -> Message:
        served, _ = self._find(message)
        config = model_config(served, self._state.settings.max_batch)
        return pb.ModelConfigResponse(config=_message(config, pb.ModelConfig()))

    def _model_statistics(self, message: pb.ModelStatisticsRequest) -> Message:
        names = [message.name] if message.name else list(self._state.slots)
        found = [
            each
            for name in names
            for each in statistics(self._state.slot(name).ref.name, self._state.metrics)
            if message.version in ("", each.version)
        ]
        return _message(Statistics(found), pb.ModelStatisticsResponse())

    def _repository_index(self, message: pb.RepositoryIndexRequest) -> Message:
        entries = index(self._state.slots)
        return _message({"models": entries}, pb.RepositoryIndexResponse())

    def _find(self, message: Any) -> Any:
        wanted = target(message.name, message.version)
        return self._state.pipeline.find(wanted.name, wanted.version, wanted.alias)


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


def _message(record: Any, empty: AnyMessage) -> AnyMessage:
    """``record`` as a message; members that the message does not have are left out."""
    return json_format.ParseDict(msgspec.to_builtins(record), empty, ignore_unknown_fields=True)
