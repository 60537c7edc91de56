"""Sends requests with ``tritonclient`` until standard input ends.

    triton_load.py http|grpc HOST:PORT FOLDER

Prints one JSON object: how many answers each version gave, and the errors.
"""

import json
import sys
import threading
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

CLIENTS = 3


def main() -> None:
    protocol, url, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    triton = import_module(f"tritonclient.{protocol}")
    pictures = [file.read_bytes() for file in sorted(folder.glob("*.png"))]
    stop = threading.Event()
    versions: Counter[str] = Counter()
    errors: list[str] = []

    def ask(first: int) -> None:
        client = triton.InferenceServerClient(url)
        number = first
        while not stop.is_set():
            image = triton.InferInput("image", [1], "BYTES")
            image.set_data_from_numpy(np.array([pictures[number % len(pictures)]], dtype=object))
            number += 1
            try:
                versions[version_of(client.infer("digits", [image]).get_response())] += 1
            except Exception as error:  # noqa: BLE001 - every failure counts
                errors.append(f"{error!r} {error}")

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(CLIENTS)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"versions": versions, "errors": errors}))


def version_of(response: Any) -> str:
    if isinstance(response, dict):
        return str(response["model_version"])
    return str(response.model_version)


if __name__ == "__main__":
    main()
