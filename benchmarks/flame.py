"""Measures how a worker spends its time under load: the share of each part, and a flame graph.

    python -m benchmarks.flame [--workload w1] [--connections 32] [--svg FILE] [--json FILE]

py-spy samples one worker of a running service 500 times a second, while clients send requests as in
``benchmarks.serving``. Waiting threads are not counted. Needs root, or permission for ptrace.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.closed_loop import Figures, explain, load, post
from benchmarks.common import parser, report, running_service
from benchmarks.serving import HOME, WORKERS, predictions, prepare

RATE = 500
# A stack counts for the part of its innermost frame that contains one of these paths.
PARTS = {
    "registry/model/plans/": "forward pass",
    "registry/model/classifier.py": "forward pass",
    "PIL/": "decode",
    "registry/model/image/decode.py": "decode",
    "service/inference/batcher.py": "batcher",
    "service/protocols/": "request to queue, scores to JSON",
    "service/http/": "request to queue, scores to JSON",
    "gunicorn/http/": "gunicorn: requests parsed, answers framed",
    "gunicorn/workers/": "loop and sockets",
    "service/server/": "loop and sockets",
    "service/observability/metrics.py": "metrics",
}


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--workload", default="w1", choices=("w1", "w2"))
    options.add_argument("--connections", type=int, default=32)
    options.add_argument("--seconds", type=int, default=10)
    options.add_argument("--svg", type=Path, help="write the flame graph to this file")
    arguments = options.parse_args()
    bundle = prepare(arguments.workload)
    model = bundle.manifest.model
    pictures = [bundle.read(each.file) for each in bundle.golden()]
    shapes = {"raw": Path(tempfile.mkstemp(suffix=".txt")[1])}
    if arguments.svg:
        shapes["flamegraph"] = arguments.svg
    figures: dict[str, object] = {
        "command": f"python -m benchmarks.flame {' '.join(sys.argv[1:])}",
        "connections": arguments.connections,
    }
    rows: list[Figures] = []
    with running_service(HOME, f"models:/{model}@champion", WORKERS) as service:
        pid = service.workers()[0].pid
        questions = []
        for picture in pictures:
            found = predictions(service.port, picture)
            questions.append(post(picture, [frozenset({max(found, key=found.__getitem__)})]))
        for form, file in shapes.items():
            with ThreadPoolExecutor() as pool:
                loading = pool.submit(
                    load, service.port, arguments.connections, arguments.seconds + 3, questions
                )
                record(pid, form, file, arguments.seconds)
                rows.append(loading.result())
    figures["requests/s while watched"] = rows[0]["rps"]
    figures["failures"] = "; ".join(filter(None, map(explain, rows))) or 0
    figures |= {f"% {part}": share for part, share in shares(shapes["raw"].read_text()).items()}
    shapes["raw"].unlink()
    report(figures, arguments.json)
    return 1 if figures["failures"] else 0


def record(pid: int, form: str, file: Path, seconds: int) -> None:
    subprocess.run(
        [
            *(str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(pid)),
            *("--rate", str(RATE), "--duration", str(seconds), "--format", form),
            *("--output", str(file)),
        ],
        check=True,
        capture_output=True,
    )
    if form == "flamegraph":  # py-spy's title is its command line, with paths of this machine
        title = r"\1A worker under load, percent of its samples<"
        file.write_text(re.sub(r'(id="title"[^>]*>)[^<]*<', title, file.read_text()))


def shares(stacks: str) -> dict[str, float]:
    """Percent of the samples by part, largest first; each line of ``stacks`` ends in its count."""
    counts: Counter[str] = Counter()
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        counts[part_of(stack)] += int(count)
    return {part: 100 * count / counts.total() for part, count in counts.most_common()}


def part_of(stack: str) -> str:
    for frame in reversed(stack.split(";")):
        for place, part in PARTS.items():
            if place in frame:
                return part
    return "other threads"


if __name__ == "__main__":
    sys.exit(main())
