"""A bounded load of gRPC calls through the proxy, which counts the status of each call."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import grpc

from service.protocols.grpc_v2 import inference_pb2 as pb
from tests.containers.stack import say
from tests.service.protocols.grpc_caller import Caller, request
from tests.service.protocols.tensors import bytes_tensor

CONNECTIONS = 12
# A connection sends its next call this long after an answer: 12 connections send 40 calls a second.
PAUSE_S = 0.3


def infer_request(picture: bytes) -> pb.ModelInferRequest:
    """Asks the champion of ``fashion`` for the best label of ``picture``."""
    message = request(raw=bytes_tensor([picture]), model="fashion")
    message.outputs.add(name="labels")
    message.parameters["top_k"].int64_param = 1
    return message


def label_of(answer: pb.ModelInferResponse) -> str:
    """The label in the answer to ``infer_request``; its length is in the first four bytes."""
    return answer.raw_output_contents[0][4:].decode()


@contextlib.contextmanager
def grpc_load(port: int, picture: bytes, token: str) -> Iterator[Counter[str]]:
    """Send calls while the block runs; after it, the counts by status are complete.

    Each connection has one call at a time, and sends ``token`` with it. A call is not sent twice.
    """
    stop, counts = Event(), Counter[str]()
    message = infer_request(picture)

    def drive() -> Counter[str]:
        own, caller = Counter[str](), Caller(port)
        while not stop.wait(PAUSE_S):
            try:
                answer = caller.infer(message, authorization=f"Bearer {token}")
                own["OK" if label_of(answer) == "Ankle boot" else "WRONG"] += 1
            except grpc.RpcError as raised:
                error: Any = raised
                say(f"a gRPC call failed: {error.code().name}: {error.details()}")
                own[error.code().name] += 1
        caller.close()
        return own

    with ThreadPoolExecutor(CONNECTIONS) as threads:
        drivers = [threads.submit(drive) for _ in range(CONNECTIONS)]
        try:
            yield counts
        finally:
            stop.set()
    for driver in drivers:
        counts.update(driver.result())
