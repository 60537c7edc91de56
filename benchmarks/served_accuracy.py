"""Checks that the service is as accurate as training measured, by every test picture over HTTP.

    python -m benchmarks.served_accuracy [--model REF] [--plans NAMES] [--json FILE]

Exits 1 if ``torch-eager``, with which training measures, does not give exactly the same number of
right answers as in training, or if another plan loses more than 0.1 percentage points.
The version must be on disk: ``convoy pull …``.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from benchmarks.common import (
    RunningService,
    parser,
    post_image,
    report,
    running_service,
    served_plan,
)
from registry.core.paths import convoy_paths
from registry.delivery.deployment import read_deployment, version_folder
from registry.model.bundle import open_bundle
from registry.model.plans.torch_eager import EAGER
from registry.model.refs import parse_model_ref
from training.data.sources import Examples, load_dataset

CLIENTS = 4
PLANS = (EAGER, "onnxruntime-fp32", "openvino-fp32", "openvino-bf16", "openvino-int8", "torch-bf16")


def main() -> int:
    options = parser("Accuracy of the served endpoint on the whole test set.")
    options.add_argument("--model", default="models:/fashion@champion")
    options.add_argument("--plans", default=",".join(PLANS), help="comma-separated")
    arguments = options.parse_args()
    paths = convoy_paths()
    ref = parse_model_ref(arguments.model)
    deployment = read_deployment(paths.models, ref)
    if deployment is None:
        raise SystemExit(f"{ref} is not deployed here; run: convoy pull {ref}")
    version = deployment.versions[0].version
    manifest = open_bundle(version_folder(paths.models, ref.name, version)).manifest
    data = load_dataset(manifest.data.name, paths.datasets)
    if data.sha256 != manifest.data.sha256:
        raise SystemExit(
            f"{ref} was trained on other data of the name {manifest.data.name}; train it again"
        )

    measured = round(manifest.metrics["test_accuracy"] * len(data.test))
    right: dict[str, int] = {}
    for plan in arguments.plans.split(","):
        with running_service(paths.root, str(ref), plan=plan) as service:
            served = served_plan(service, ref.name)
            if served != plan:
                raise SystemExit(f"plan {plan} was wanted, but {served} serves; check --plans")
            predicted = classify_all(service, data.test)
        right[plan] = int((np.array(predicted) == data.test.labels).sum())
    report(
        {
            "model": f"{ref.name} version {version} ({manifest.source.recipe})",
            "pictures": len(data.test),
            "right in training": measured,
            **{f"right over HTTP by {plan}": count for plan, count in right.items()},
        },
        arguments.json,
    )
    lost = [measured - count for count in right.values()]
    exact = right.get(EAGER, measured) == measured
    return 0 if exact and max(lost) <= 0.001 * len(data.test) else 1


def classify_all(service: RunningService, examples: Examples) -> list[int]:
    """The index of the best class of every example; four clients send requests at once."""

    def ask(positions: range) -> list[int]:
        connection = service.connect()
        found = []
        for position in positions:
            status, answer = post_image(connection, examples.encode(position))
            if status != 200:
                raise SystemExit(f"picture {position}: status {status}: {answer}")
            found.append(answer["predictions"][0]["index"])
            bar.update()
        connection.close()
        return found

    size = -(-len(examples) // CLIENTS)
    parts = [range(at, min(at + size, len(examples))) for at in range(0, len(examples), size)]
    with tqdm(total=len(examples), unit="img", disable=None) as bar, ThreadPoolExecutor() as pool:
        return [index for part in pool.map(ask, parts) for index in part]


if __name__ == "__main__":
    sys.exit(main())
