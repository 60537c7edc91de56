"""Measures the time from start to ready, and the memory of one worker.

    python -m benchmarks.startup [--model models:/fashion@champion] [--runs 5] [--json FILE]

The version must be on disk. Memory is the worker's resident set after a thousand requests.
"""

import statistics
import subprocess
import sys

import numpy as np

from benchmarks.common import parser, post_image, report, running_service
from registry.core.paths import convoy_paths
from registry.delivery.deployment import read_deployment, version_folder
from registry.model.bundle import open_bundle
from registry.model.refs import parse_model_ref

REQUESTS = 1000


def main() -> int:
    options = parser("Start to ready and memory of one worker.")
    options.add_argument("--model", default="models:/fashion@champion")
    options.add_argument("--runs", type=int, default=5)
    arguments = options.parse_args()
    paths, ref = convoy_paths(), parse_model_ref(arguments.model)
    deployment = read_deployment(paths.models, ref)
    if deployment is None:
        raise SystemExit(f"{ref} is not deployed here; run: convoy pull {ref}")
    bundle = open_bundle(version_folder(paths.models, ref.name, deployment.versions[0].version))
    golden = bundle.golden()[0]
    image, best = bundle.read(golden.file), int(np.argmax(golden.probabilities))

    with running_service(paths.root, str(ref), workers=1):
        pass  # the first start on a machine chooses the plan, and is not measured
    starts_s, sizes_mb = [], []
    for _ in range(arguments.runs):
        with running_service(paths.root, str(ref), workers=1) as service:
            starts_s.append(service.start_to_ready_s)
            connection = service.connect()
            for _ in range(REQUESTS):
                status, answer = post_image(connection, image)
                if status != 200 or answer["predictions"][0]["index"] != best:
                    raise SystemExit(f"class {best} was expected, but got {status}: {answer}")
            connection.close()
            (worker,) = service.workers()
            sizes_mb.append(worker.memory_info().rss / 1e6)
    report(
        {
            "model": f"{ref.name} ({bundle.manifest.source.recipe})",
            "runs": arguments.runs,
            "start to ready, median s": statistics.median(starts_s),
            "start to ready, worst s": max(starts_s),
            f"worker RSS after {REQUESTS} requests, median MB": statistics.median(sizes_mb),
            "worker RSS, worst MB": max(sizes_mb),
            "modules of MLflow imported": mlflow_modules(),
        },
        arguments.json,
    )
    return 0


def mlflow_modules() -> int:
    """How many modules of MLflow are loaded after ``create_app``."""
    code = (
        "import sys; from service import create_app; create_app();"
        "print(sum(name.partition('.')[0] == 'mlflow' for name in sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return int(answer.stdout)


if __name__ == "__main__":
    sys.exit(main())
