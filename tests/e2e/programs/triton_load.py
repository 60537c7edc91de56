"""Load by ``tritonclient.http``: ``triton_load.py HOST:PORT FOLDER`` until its input ends.

Prints one JSON object: how many answers each version gave, and the errors.
"""

import json
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import tritonclient.http as triton

CLIENTS = 3


def main() -> None:
    url, folder = sys.argv[1], Path(sys.argv[2])
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
                versions[client.infer("digits", [image]).get_response()["model_version"]] += 1
            except Exception as error:  # noqa: BLE001 - every failure counts
                errors.append(repr(error))

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(CLIENTS)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"versions": versions, "errors": errors}))


if __name__ == "__main__":
    main()
