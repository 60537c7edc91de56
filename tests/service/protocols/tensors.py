"""Bodies of the Open Inference Protocol, made without the code under test."""

import base64
import json
import struct
from typing import Any

import numpy as np

from registry.model.manifest import PreprocessSpec

BINARY = "application/octet-stream"
JSON = "application/json"


def bytes_tensor(images: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(each)) + each for each in images)


def normalised(pixels: Any, spec: PreprocessSpec) -> Any:
    """What a client that preprocesses itself sends: float32 (N, C, H, W) of uint8 (N, H, W, C)."""
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    values = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def tensor(datatype: str, shape: list[int], **more: Any) -> dict[str, Any]:
    return {"name": "image", "datatype": datatype, "shape": shape, **more}


def in_json(datatype: str, shape: list[int], data: Any, **members: Any) -> dict[str, Any]:
    """Arguments of a client's ``post`` for a tensor in JSON."""
    body = {"inputs": [tensor(datatype, shape, data=data)], **members}
    return {"data": json.dumps(body).encode(), "content_type": JSON}


def in_binary(datatype: str, shape: list[int], data: bytes, **members: Any) -> dict[str, Any]:
    """Arguments of a client's ``post`` for a tensor in binary form."""
    parameters = {"binary_data_size": len(data)}
    head = json.dumps({"inputs": [tensor(datatype, shape, parameters=parameters)], **members})
    return {
        "data": head.encode() + data,
        "content_type": BINARY,
        "headers": {"Inference-Header-Content-Length": str(len(head))},
    }


def forms(images: list[bytes], pixels: Any, spec: PreprocessSpec) -> dict[str, dict[str, Any]]:
    """Every form in which a request may have the images: name → arguments of ``post``."""
    texts = [base64.b64encode(each).decode() for each in images]
    floats, number = normalised(pixels, spec), len(images)
    return {
        "BYTES json": in_json("BYTES", [number], texts),
        "BYTES json column": in_json("BYTES", [number, 1], [[text] for text in texts]),
        "BYTES json flat column": in_json("BYTES", [number, 1], texts),
        "BYTES binary": in_binary("BYTES", [number], bytes_tensor(images)),
        "BYTES binary column": in_binary("BYTES", [number, 1], bytes_tensor(images)),
        "UINT8 json": in_json("UINT8", list(pixels.shape), pixels.ravel().tolist()),
        "UINT8 json nested": in_json("UINT8", list(pixels.shape), pixels.tolist()),
        "UINT8 binary": in_binary("UINT8", list(pixels.shape), pixels.tobytes()),
        "FP32 json": in_json("FP32", list(floats.shape), floats.ravel().tolist()),
        "FP32 binary": in_binary("FP32", list(floats.shape), floats.tobytes()),
    }
