"""Can large pictures starve small ones? 28×28 PNGs alone, and beside camera originals.

    python -m benchmarks.mixed [--seconds 4] [--repetitions 3] [--json FILE]

Eight connections ask for small pictures all the time, as in ``benchmarks.serving``; in every second
window four more post JPEGs of 11.9 megapixels. The textbook handler bears the same, in turns.
"""

import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

from PIL import Image

from benchmarks.common import parser, report, running_service
from benchmarks.serving import HOME, WORKERS, Figures, peer, prepare, wrk

SMALL_CONNECTIONS, LARGE_CONNECTIONS = 8, 4
LARGE_PX = (3984, 2988)


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, default=4.0)
    options.add_argument("--repetitions", type=int, default=3)
    arguments = options.parse_args()
    bundle = prepare("w1")
    small = [bundle.folder / each.file for each in bundle.golden()]
    runs: dict[str, list[tuple[Figures, Figures, Figures]]] = {"convoy": [], "textbook": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        peer("textbook", bundle) as textbook,
        running_service(HOME, f"models:/{bundle.manifest.model}@champion", WORKERS) as service,
    ):
        large = [write_large(Path(folder) / "large.jpg")]
        ports = {"convoy": service.port, "textbook": textbook}
        for _ in range(arguments.repetitions):
            for name, port in ports.items():
                alone = wrk(port, SMALL_CONNECTIONS, arguments.seconds, small)
                with ThreadPoolExecutor() as pool:
                    beside = pool.submit(wrk, port, LARGE_CONNECTIONS, arguments.seconds, large)
                    mixed = wrk(port, SMALL_CONNECTIONS, arguments.seconds, small)
                    runs[name].append((alone, mixed, beside.result()))
    figures: dict[str, object] = {
        "small connections": SMALL_CONNECTIONS,
        "large connections": LARGE_CONNECTIONS,
        "megapixels of a large one": LARGE_PX[0] * LARGE_PX[1] / 1e6,
        "cores": os.cpu_count(),
    }
    for name, found in runs.items():
        for position, what in enumerate(("small alone", "small beside large", "large")):
            for key in ("rps", "p50_ms", "p99_ms"):
                figures[f"{name}: {what}, {key}"] = statistics.median(
                    each[position][key] for each in found
                )
        figures[f"{name}: errors"] = sum(part["errors"] for each in found for part in each)
    report(figures, arguments.json)
    return 0


def write_large(file: Path) -> Path:
    """A photograph as a camera would give it."""
    with Image.open(str(files("sklearn").joinpath("datasets/images/china.jpg"))) as photograph:
        photograph.resize(LARGE_PX, Image.Resampling.BICUBIC).save(file, quality=90)
    return file


if __name__ == "__main__":
    sys.exit(main())
