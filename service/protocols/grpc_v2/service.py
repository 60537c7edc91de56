"""``InferenceService``: the calls of the protocol's gRPC service."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
import msgspec
from google.protobuf import json_format
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from registry.auth.tokens import Right
from registry.core.errors import ModelNotFound
from service.http.health import readiness
from service.inference.requests import Job, Request
from service.protocols.grpc_v2 import inference_pb2 as pb
from service.protocols.grpc_v2.call_threads import Turns
from service.protocols.grpc_v2.calls import PROTOCOL, SERVICE, Call
from service.protocols.grpc_v2.infer import InferImages
from service.protocols.grpc_v2.receiving import Receiver
from service.protocols.openinference.metadata import (
    index,
    model_config,
    model_metadata,
    model_statistics,
    server_metadata,
)
from service.protocols.openinference.protocol import target
from service.state import State

AnyMessage = TypeVar("AnyMessage", bound=Message)
Answer = Callable[[Iterator[bytes], grpc.ServicerContext], bytes]
HEALTH_SERVICE = "grpc.health.v1.Health"


class InferenceService:
    """The calls. It has many methods because each call of the protocol is one of them.

    Sources: the protocol's ``inference.proto``; for ``Check``, github.com/grpc/grpc,
    doc/health-checking.md. Its ``Watch`` is not implemented.
    """

    def __init__(self, state: State, receiver: Receiver, turns: Turns) -> None:
        """Answer with the models of ``state``; inference takes ``turns``."""
        self._state = state
        self._receiver = receiver
        self._turns = turns
        self.ending = False
        """Whether the worker ends soon; clients then see that the server is not ready."""

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """The calls of the protocol, and the call of gRPC's health checks, for ``grpc.server``."""
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
        answers = {name: self._guarded(name, *each) for name, each in calls.items()}
        answers["ModelInfer"] = self._model_infer
        check = self._guarded("Check", self._check, health_pb2.HealthCheckRequest, ())
        return [_handlers(SERVICE, answers), _handlers(HEALTH_SERVICE, {"Check": check})]

    @property
    def is_ready(self) -> bool:
        """Whether this worker can answer."""
        return readiness(self._state, self.ending).ready

    def _guarded(
        self, name: str, call: Callable[[Any], Message], kind: Any, rights: tuple[Right, ...]
    ) -> Answer:
        """``call`` for clients with one of the ``rights``, with errors as gRPC has them."""

        def answer(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            current = Call(name, context, self._state)
            try:
                self._state.access_control.admit_with(current.environ, rights)
                with self._receiver.message(messages, context.cancel) as data:
                    found = call(current.parse(kind, data))
            except grpc.RpcError:
                current.give_up()
                raise
            except Exception as error:  # noqa: BLE001 - the edge of a call
                current.fail(error)
            return current.succeed(found)

        return answer

    def _model_infer(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        state = self._state
        current = Call("ModelInfer", context, state)
        try:
            state.access_control.admit(current.environ)
            with self._receiver.message(messages, context.cancel) as data:
                answer = self._infer(current.parse(pb.ModelInferRequest, data), current)
        except grpc.RpcError:
            current.give_up()
            raise
        except Exception as error:  # noqa: BLE001 - the edge of a call
            served = current.job.served if current.job else None
            version = served.version if served else None
            state.pipeline.refuse(current.model_name, version, PROTOCOL, error)
            current.fail(error)
        return current.succeed(answer)

    def _infer(self, message: pb.ModelInferRequest, current: Call) -> pb.ModelInferResponse:
        settings, pipeline = self._state.settings, self._state.pipeline
        images = InferImages(message, settings)
        with self._turns:
            current.check_client_waits()
            current.job = Job(
                Request(
                    images=images,
                    protocol=PROTOCOL,
                    target=target(message.model_name, message.model_version),
                    session=current.environ.get(settings.session_variable),
                    waiting=self._turns.waiting,
                    started=current.received,
                )
            )
            pipeline.submit(current.job)
            return pipeline.finish(current.job, images.answer)

    def _check(self, message: health_pb2.HealthCheckRequest) -> Message:
        if message.service not in ("", SERVICE):
            raise ModelNotFound(f"there is no service {message.service[:80]!r}")
        status = "SERVING" if self.is_ready else "NOT_SERVING"
        answer: Message = health_pb2.HealthCheckResponse(status=status)
        return answer

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
        found = model_statistics(self._state, target(message.name, message.version))
        return _message(found, pb.ModelStatisticsResponse())

    def _repository_index(self, message: pb.RepositoryIndexRequest) -> Message:
        entries = index(self._state.slots)
        return _message({"models": entries}, pb.RepositoryIndexResponse())

    def _find(self, message: Any) -> Any:
        return self._state.pipeline.find(target(message.name, message.version))


def _handlers(service: str, answers: dict[str, Answer]) -> grpc.GenericRpcHandler:
    """The calls of one service.

    Their clients send one message. As grpcio's calls with a stream of messages, they read it
    themselves: after the checks of the call's metadata, and by the ``Receiver``.
    """
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        name: grpc.stream_unary_rpc_method_handler(answer) for name, answer in answers.items()
    }
    return grpc.method_handlers_generic_handler(service, handlers)


def _message(record: Any, empty: AnyMessage) -> AnyMessage:
    """``record`` as a message; members that the message does not have are left out."""
    return json_format.ParseDict(msgspec.to_builtins(record), empty, ignore_unknown_fields=True)
