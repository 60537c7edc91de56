"""Asks a service with NVIDIA's ``tritonclient.http``: ``triton_http.py HOST:PORT FOLDER``.

The folder has ``inputs.npz``: encoded pictures (object), their ``pixels`` uint8 (N, H, W, C), and
``normalised`` float32 (N, C, H, W). Prints the answers as one JSON
object.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

MODEL = "digits"


def tensor(name: str, datatype: str, values: Any, binary: bool) -> Any:
    found = triton.InferInput(name, list(values.shape), datatype)
    found.set_data_from_numpy(values, binary_data=binary)
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
    answers: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(MODEL),
        "version_ready": client.is_model_ready(MODEL, "1"),
        "other_ready": client.is_model_ready(MODEL, "77"),
        "server": client.get_server_metadata(),
        "metadata": client.get_model_metadata(MODEL),
        "config": client.get_model_config(MODEL),
        "index": client.get_model_repository_index(),
        "refused": {
            "load": refusal(lambda: client.load_model(MODEL)),
            "shared": refusal(lambda: client.get_system_shared_memory_status()),
            "trace": refusal(lambda: client.get_trace_settings()),
            "sequence": refusal(
                lambda: client.infer(
                    MODEL, [tensor(*inputs["bytes"], True)], sequence_id=3, sequence_start=True
                )
            ),
            "unknown": refusal(lambda: client.infer("other", [tensor(*inputs["bytes"], True)])),
            "gzip": refusal(
                lambda: client.infer(
                    MODEL,
                    [tensor(*inputs["bytes"], True)],
                    request_compression_algorithm="gzip",
                )
            ),
        },
    }
    probabilities: dict[str, Any] = {}
    for form, described in inputs.items():
        binary = client.infer(MODEL, [tensor(*described, True)], request_id=form)
        assert binary.get_response()["id"] == form
        probabilities[f"{form} binary"] = binary.as_numpy("probabilities").tolist()
        answers["labels"] = [each.decode() for each in binary.as_numpy("labels")[:, 0]]
        if described[1] != "BYTES":
            wanted = [triton.InferRequestedOutput("probabilities", binary_data=False)]
            plain = client.infer(MODEL, [tensor(*described, False)], outputs=wanted)
            probabilities[f"{form} json"] = plain.as_numpy("probabilities").tolist()
    answers["probabilities"] = probabilities
    wanted = [triton.InferRequestedOutput("probabilities", class_count=3)]
    classes = client.infer(MODEL, [tensor(*inputs["bytes"], True)], outputs=wanted)
    answers["classification"] = [
        [each.decode() for each in row] for row in classes.as_numpy("probabilities")
    ]
    top = client.infer(MODEL, [tensor(*inputs["bytes"], True)], parameters={"top_k": 2})
    answers["top_k"] = [[each.decode() for each in row] for row in top.as_numpy("labels")]
    started = [
        triton.InferenceServerClient(url, concurrency=4).async_infer(
            MODEL, [tensor(*inputs["bytes"], True)]
        )
        for _ in range(3)
    ]
    answers["async"] = [each.get_result().as_numpy("probabilities").tolist() for each in started]
    answers["aio"] = asyncio.run(infer_aio(url, tensor(*inputs["bytes"], True)))
    answers["statistics"] = client.get_inference_statistics(MODEL)
    print(json.dumps(answers))


async def infer_aio(url: str, image: Any) -> Any:
    async with triton_aio.InferenceServerClient(url) as client:
        assert await client.is_model_ready(MODEL)
        answer = await client.infer(MODEL, [image])
        return answer.as_numpy("probabilities").tolist()


if __name__ == "__main__":
    main()
