"""Asks a service with NVIDIA's ``tritonclient.grpc``: ``triton_grpc.py HOST:PORT FOLDER``.

The folder is that of ``triton_http.py``. Prints the answers as one JSON object.
"""

import asyncio
import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

MODEL = "digits"


def tensor(name: str, datatype: str, values: Any) -> Any:
    found = triton.InferInput(name, list(values.shape), datatype)
    found.set_data_from_numpy(values)
    return found


def refusal(call: Any) -> dict[str, Any]:
    try:
        call()
    except InferenceServerException as error:
        return {"status": error.status(), "message": error.message()}
    return {"status": None}


def main() -> None:
    url, folder = sys.argv[1], Path(sys.argv[2])
    files = sorted(folder.glob("*.png"))
    encoded = np.array([file.read_bytes() for file in files], dtype=object)
    arrays = np.load(folder / "arrays.npz")
    inputs = {
        "bytes": ("image", "BYTES", encoded),
        "bytes_column": ("image", "BYTES", encoded.reshape(-1, 1)),
        "pixels": ("pixels", "UINT8", arrays["pixels"]),
        "normalised": ("normalised", "FP32", arrays["normalised"]),
    }
    client = triton.InferenceServerClient(url)
    image = [tensor(*inputs["bytes"])]
    answers: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(MODEL),
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata(MODEL, as_json=True),
        "config": client.get_model_config(MODEL, as_json=True),
        "index": client.get_model_repository_index(as_json=True),
        "refused": {
            "load": refusal(lambda: client.load_model(MODEL)),
            "unknown": refusal(lambda: client.infer("other", image)),
            "version": refusal(lambda: client.is_model_ready(MODEL, "77")),
            "sequence": refusal(lambda: client.infer(MODEL, image, sequence_id=3)),
            "shape": refusal(
                lambda: client.infer(MODEL, [tensor("x", "UINT8", arrays["pixels"][:, :4])])
            ),
        },
        "probabilities": {},
    }
    for form, described in inputs.items():
        found = client.infer(MODEL, [tensor(*described)], request_id=form)
        assert found.get_response().id == form
        answers["probabilities"][form] = found.as_numpy("probabilities").tolist()
        answers["labels"] = [each.decode() for each in found.as_numpy("labels")[:, 0]]
    wanted = [triton.InferRequestedOutput("probabilities", class_count=3)]
    classes = client.infer(MODEL, image, outputs=wanted).as_numpy("probabilities")
    answers["classification"] = [[each.decode() for each in row] for row in classes]
    called, done = [], threading.Event()

    def on_answer(result: Any, error: Any) -> None:
        called.append((result, error))
        done.set()

    client.async_infer(MODEL, image, on_answer)
    assert done.wait(60)
    ((result, error),) = called
    assert error is None
    answers["async"] = result.as_numpy("probabilities").tolist()
    answers["aio"] = asyncio.run(infer_aio(url, image))
    answers["statistics"] = client.get_inference_statistics(MODEL, as_json=True)
    print(json.dumps(answers))


async def infer_aio(url: str, image: Any) -> Any:
    async with triton_aio.InferenceServerClient(url) as client:
        assert await client.is_model_ready(MODEL)
        answer = await client.infer(MODEL, image)
        return answer.as_numpy("probabilities").tolist()


if __name__ == "__main__":
    main()
