"""Asks a service with KServe's ``InferenceRESTClient``: ``kserve_rest.py URL FOLDER``.

The folder is that of ``triton_http.py``. Prints the answers as one JSON object.
"""

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import RequestedOutput

MODEL = "digits"


def request(datatype: str, values: Any, binary: bool, **parameters: Any) -> InferRequest:
    tensor = InferInput("x", list(values.shape), datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    outputs = [RequestedOutput("probabilities", {"binary_data": True}), RequestedOutput("labels")]
    wanted = outputs if parameters.pop("wants_binary", False) else None
    return InferRequest(
        MODEL, [tensor], request_id="7", parameters=parameters or None, request_outputs=wanted
    )


async def main() -> None:
    url, folder = sys.argv[1], Path(sys.argv[2])
    pictures = [file.read_bytes() for file in sorted(folder.glob("*.png"))]
    encoded = np.array(pictures, dtype=object)
    texts = np.array([base64.b64encode(each).decode() for each in pictures], dtype=object)
    arrays = np.load(folder / "arrays.npz")
    requests = {
        "bytes binary": request("BYTES", encoded, binary=True),
        "bytes json": request("BYTES", texts, binary=False),
        "pixels binary": request("UINT8", arrays["pixels"], binary=True, wants_binary=True),
        "pixels json": request("UINT8", arrays["pixels"], binary=False),
        "normalised binary": request("FP32", arrays["normalised"], binary=True),
        "normalised json": request("FP32", arrays["normalised"], binary=False),
    }
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    answers: dict[str, Any] = {
        "live": await client.is_server_live(url),
        "ready": await client.is_server_ready(url),
        "model_ready": await client.is_model_ready(url, MODEL),
        "probabilities": {},
    }
    for name, each in requests.items():
        found = await client.infer(url, each, model_name=MODEL)
        assert (found.id, found.model_name) == ("7", MODEL)
        tensor = found.get_output_by_name("probabilities")
        answers["probabilities"][name] = tensor.as_numpy().tolist()
    try:
        await client.infer(url, requests["bytes json"], model_name="other")
    except httpx.HTTPStatusError as error:
        answers["refused"] = {"status": error.response.status_code, "message": str(error)}
    print(json.dumps(answers))


if __name__ == "__main__":
    asyncio.run(main())
