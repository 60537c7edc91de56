"""Mutated requests of the protocols that take tensors and tables, for tests and for the chaos runs.

Mutants are reproducible: request number N of a seed is always the same.
"""

import json
import random
import struct
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

SPLICES = (
    *(
        b"null",
        b"[]",
        b"{}",
        b"-1",
        b"1e400",
        b"NaN",
        b'"',
        b"\\",
        b"\xff",
        b"\x00",
        b"[[[[",
        b"}}}}",
    ),
    *(b'"BYTES"', b'"UINT8"', b'"FP32"', b"4294967295", b"\xff\xff\xff\xff", b"\x00\x00\x00\x00"),
    *(
        b'"shape": [1000000]',
        b'"binary_data_size": 7',
        b'"parameters": {"top_k": 0}',
        b"\xef\xbb\xbf",
    ),
)


class Posted(Struct, frozen=True):
    """One POST: its path, Content-Type, Inference-Header-Content-Length (or empty) and body."""

    path: str
    content_type: str
    head_bytes: str
    body: bytes


def seeds(image: bytes, text: str, pixels: bytes, floats: bytes, side: int) -> list[Posted]:
    """Good requests, one of each form, for one picture: encoded, as base64, and as tensors."""
    infer, found = "/v2/models/digits/infer", []
    for datatype, shape, data in (
        ("BYTES", [1], struct.pack("<I", len(image)) + image),
        ("BYTES", [2, 1], 2 * (struct.pack("<I", len(image)) + image)),
        ("UINT8", [1, side, side, 1], pixels),
        ("FP32", [1, 1, side, side], floats),
    ):
        parameters = {"binary_data_size": len(data)}
        tensor = {"name": "x", "datatype": datatype, "shape": shape, "parameters": parameters}
        wanted = {"name": "probabilities", "parameters": {"classification": 2}}
        head = json.dumps({"id": "7", "inputs": [tensor], "outputs": [wanted]}).encode()
        found.append(Posted(infer, "application/octet-stream", str(len(head)), head + data))
    for datatype, shape, values in (
        ("BYTES", [1], [text]),
        ("UINT8", [1, side, side, 1], list(pixels)),
        ("FP32", [1, 1, side, side], [0.5] * side * side),
    ):
        tensor = {"name": "x", "datatype": datatype, "shape": shape, "data": values}
        body = {"inputs": [tensor], "parameters": {"top_k": 2, "binary_data_output": True}}
        found.append(Posted(infer, "application/json", "", json.dumps(body).encode()))
    tables: list[Any] = [
        {"dataframe_split": {"columns": ["id", "image"], "data": [[1, text]]}},
        {"dataframe_records": [{"image": text, "id": 1}]},
        {"instances": [{"image": {"b64": text}}]},
        {"inputs": [text], "params": {"x": 1}},
    ]
    bodies = [json.dumps(table).encode() for table in tables]
    found += [Posted("/invocations", "application/json", "", body) for body in bodies]
    return [*found, Posted("/invocations", "text/csv", "", f'id,image\n1,"{text}"\n'.encode())]


def mutants(good: list[Posted], count: int, seed: int = 0) -> Iterator[Posted]:
    """``count`` requests, each one of the ``good`` with one to four changes."""
    chance = random.Random(seed)
    for _ in range(count):
        one = chance.choice(good)
        body = bytearray(one.body)
        for _ in range(chance.randint(1, 4)):
            _change(body, good, chance)
        head_bytes = one.head_bytes
        if head_bytes and chance.random() < 0.3:
            head_bytes = str(chance.choice((0, 1, len(body), len(body) + 1, 10**9, -1)))
        yield Posted(one.path, one.content_type, head_bytes, bytes(body))


def _change(body: bytearray, good: list[Posted], chance: random.Random) -> None:
    """Change ``body`` at a random place: a byte, a splice, a cut, a repetition, another body."""
    at = chance.randrange(len(body) + 1)
    kind = chance.randrange(6)
    if kind == 0 and at < len(body):
        body[at] = chance.randrange(256)
    elif kind == 1:
        body[at:at] = chance.choice(SPLICES)
    elif kind == 2:
        del body[at : at + chance.choice((1, 4, 40))]
    elif kind == 3:
        body[at:at] = body[at : at + chance.choice((1, 8, 200))] * chance.choice((1, 2, 50))
    elif kind == 4:
        del body[at:]
    else:
        other = chance.choice(good).body
        body[at:] = other[chance.randrange(len(other)) :]
