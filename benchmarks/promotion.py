"""How long a promotion takes to reach every worker, and what it costs the clients meanwhile.

    python -m benchmarks.promotion [--swaps 10] [--json FILE]

Makes a home of its own with two small versions of the digits, serves it with two workers and four
clients that never stop, and moves the champion back and forth. Each swap is timed from the moment
at which the alias has moved until no client gets the old version any more.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.common import RunningService, parser, post_image, report, running_service
from registry.contract import ModelRef
from registry.home import Home
from training.datasets import load_dataset

CLIENTS = 4
QUIET_S = 2.0  # a swap is over when nobody saw the old version for so long


def main() -> int:
    options = parser("Time from a promotion to the last worker.")
    options.add_argument("--swaps", type=int, default=10)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="convoy-promotion-") as name:
        home = Home(Path(name))
        prepare(home)
        image = load_dataset("digits", home.datasets).test.encode(0)
        with running_service(home.root, "models:/digits@champion", pull=True) as service:
            figures = measure(home, service, image, arguments.swaps)
    report(figures, arguments.json)
    return 0 if figures["requests failed"] == 0 else 1


def prepare(home: Home) -> None:
    """Two versions; the first is champion and lies on disk."""
    for epochs in ("2", "6"):
        run(home, "training", "--data", "digits", "--recipe", "dense", "--set", f"epochs={epochs}")
    run(home, "registry", "promote", "digits", "1")
    run(home, "registry", "pull", "models:/digits@champion")


def measure(home: Home, service: RunningService, image: bytes, swaps: int) -> dict[str, object]:
    from registry.store import ModelStore

    store = ModelStore(Home(home.root))
    answers: list[tuple[float, int, int | None]] = []  # (when, status, version)
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            connection = service.connect()  # a new one each time: any worker may take it
            try:
                status, answer = post_image(connection, image)
            except OSError:
                status, answer = 0, {}
            finally:
                connection.close()
            version = answer.get("model", {}).get("version")
            answers.append((time.monotonic(), status, version))

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    taken_s = []
    try:
        for number in tqdm(range(swaps), unit="swap", disable=None):
            version = 2 if number % 2 == 0 else 1
            store.point("digits", champion=version, previous=None)
            assert store.resolve(ModelRef("digits", alias="champion")).version == version
            moved = last_old = time.monotonic()
            while time.monotonic() - last_old < QUIET_S:
                time.sleep(0.1)
                old = [when for when, _, seen in answers[-20_000:] if seen not in (version, None)]
                last_old = max([moved, *(when for when in old if when > moved)])
                if answers[-1][2] != version:
                    last_old = time.monotonic()
            taken_s.append(last_old - moved)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return {
        "swaps": swaps,
        "promotion to last worker, median s": statistics.median(taken_s),
        "promotion to last worker, worst s": max(taken_s),
        "requests": len(answers),
        "requests failed": sum(status != 200 for _, status, _ in answers),
    }


def run(home: Home, *arguments: str) -> None:
    environment = {**os.environ, "CONVOY_HOME": str(home.root)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    subprocess.run(
        [sys.executable, "-m", *arguments], check=True, capture_output=True, env=environment
    )


if __name__ == "__main__":
    sys.exit(main())
