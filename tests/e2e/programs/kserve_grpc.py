"""Asks a service with KServe's ``InferenceGRPCClient``: ``kserve_grpc.py HOST:PORT FOLDER``.

The folder is that of ``triton_http.py``. Prints the answers as one JSON object.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kserve import InferenceGRPCClient, InferInput, InferRequest

MODEL = "digits"


def request(datatype: str, values: Any, binary: bool) -> InferRequest:
    tensor = InferInput("x", list(values.shape), datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    return InferRequest(MODEL, [tensor], request_id="7")


async def main() -> None:
    url, folder = sys.argv[1], Path(sys.argv[2])
    pictures = [file.read_bytes() for file in sorted(folder.glob("*.png"))]
    arrays = np.load(folder / "arrays.npz")
    requests = {
        "bytes raw": request("BYTES", np.array(pictures, dtype=object), binary=True),
        "pixels raw": request("UINT8", arrays["pixels"], binary=True),
        "pixels typed": request("UINT8", arrays["pixels"], binary=False),
        "normalised raw": request("FP32", arrays["normalised"], binary=True),
        "normalised typed": request("FP32", arrays["normalised"], binary=False),
    }
    answers: dict[str, Any] = {"probabilities": {}}
    async with InferenceGRPCClient(url) as client:
        answers["live"] = await client.is_server_live()
        answers["ready"] = await client.is_server_ready()
        answers["model_ready"] = await client.is_model_ready(MODEL)
        for name, each in requests.items():
            found = await client.infer(each)
            assert (found.id, found.model_name, found.model_version) == ("7", MODEL, "1")
            tensor = found.get_output_by_name("probabilities")
            answers["probabilities"][name] = tensor.as_numpy().tolist()
    async with grpc.aio.insecure_channel(url) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService"):
            checked = await health.Check(health_pb2.HealthCheckRequest(service=service))
            answers[f"health {service}".strip()] = checked.status
        try:
            await health.Check(health_pb2.HealthCheckRequest(service="other"))
        except grpc.aio.AioRpcError as error:
            answers["health other"] = error.code().name
    print(json.dumps(answers))


if __name__ == "__main__":
    asyncio.run(main())
