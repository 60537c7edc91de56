"""Measures whether large pictures delay small ones: 28×28 PNGs alone, and mixed with photographs.

    python -m benchmarks.mixed [--seconds 4] [--repetitions 3] [--json FILE]

Eight connections send small pictures all the time, as in ``benchmarks.serving``. In every second
window, four more send JPEGs of 11.9 megapixels. The textbook handler gets the same load, in turn.
Every answer is checked. If requests are refused, wrong or lost, the exit status is 1.
"""

import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

from PIL import Image

from benchmarks.closed_loop import FAILURES, Figures, load, post
from benchmarks.common import parser, report, running_service
from benchmarks.serving import HOME, WORKERS, agree, peer, prepare

SMALL_CONNECTIONS, LARGE_CONNECTIONS = 8, 4
LARGE_PX = (3984, 2988)


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, default=4.0)
    options.add_argument("--repetitions", type=int, default=3)
    arguments = options.parse_args()
    bundle = prepare("w1")
    pictures = [bundle.folder / each.file for each in bundle.golden()]
    runs: dict[str, list[tuple[Figures, Figures, Figures]]] = {"convoy": [], "textbook": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        peer("textbook", bundle) as textbook,
        running_service(HOME, f"models:/{bundle.manifest.model}@champion", WORKERS) as service,
    ):
        pictures.append(write_large(Path(folder) / "large.jpg"))
        ports = {"convoy": service.port, "textbook": textbook}
        agreed, _ = agree(ports, pictures)
        *small, large = [
            post(picture.read_bytes(), [right])
            for picture, right in zip(pictures, agreed, strict=True)
        ]
        for _ in range(arguments.repetitions):
            for name, port in ports.items():
                alone = load(port, SMALL_CONNECTIONS, arguments.seconds, small)
                with ThreadPoolExecutor() as pool:
                    large_load = pool.submit(
                        load, port, LARGE_CONNECTIONS, arguments.seconds, [large]
                    )
                    mixed = load(port, SMALL_CONNECTIONS, arguments.seconds, small)
                    runs[name].append((alone, mixed, large_load.result()))
    figures: dict[str, object] = {
        "small connections": SMALL_CONNECTIONS,
        "large connections": LARGE_CONNECTIONS,
        "megapixels of a large one": LARGE_PX[0] * LARGE_PX[1] / 1e6,
    }
    failed = 0
    for name, found in runs.items():
        for position, what in enumerate(("small alone", "small beside large", "large")):
            for key in ("rps", "p50_ms", "p99_ms"):
                figures[f"{name}: {what}, {key}"] = statistics.median(
                    each[position][key] for each in found
                )
        for kind in FAILURES:
            count = int(sum(part[kind] for each in found for part in each))
            figures[f"{name}: {kind.replace('_', ' ')}"] = count
            failed += count
    report(figures, arguments.json)
    return 1 if failed else 0


def write_large(file: Path) -> Path:
    """Write a photograph of 11.9 megapixels, as a camera would."""
    with Image.open(str(files("sklearn").joinpath("datasets/images/china.jpg"))) as photograph:
        photograph.resize(LARGE_PX, Image.Resampling.BICUBIC).save(file, quality=90)
    return file


if __name__ == "__main__":
    sys.exit(main())
