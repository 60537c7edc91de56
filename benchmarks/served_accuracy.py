"""Is what is served what was measured? Every test picture, encoded, over HTTP.

    python -m benchmarks.served_accuracy [--model models:/fashion@champion] [--json FILE]

Exits 1 unless the number of right answers equals training's to the last picture. The version must
lie on disk: ``python -m registry pull models:/fashion@champion``.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from benchmarks.common import RunningService, parser, post_image, report, running_service
from registry.bundle import open_bundle
from registry.contract import parse_model_ref
from registry.home import convoy_home
from registry.releases import read_release, version_folder
from training.datasets import Examples, load_dataset

CLIENTS = 4


def main() -> int:
    options = parser("Accuracy of the served endpoint on the whole test set.")
    options.add_argument("--model", default="models:/fashion@champion")
    arguments = options.parse_args()
    home = convoy_home()
    ref = parse_model_ref(arguments.model)
    release = read_release(home.models, ref.name)
    if release is None:
        raise SystemExit(f"nothing is released; run: python -m registry pull {ref}")
    version = release.versions[0].version
    manifest = open_bundle(version_folder(home.models, ref.name, version)).manifest
    data = load_dataset(manifest.data.name, home.datasets)
    if data.sha256 != manifest.data.sha256:
        raise SystemExit(f"{ref} was trained on another {manifest.data.name}")

    started = time.perf_counter()
    with running_service(home.root, str(ref)) as service:
        predicted = classify_all(service, data.test)
    right = sum(index == label for index, label in zip(predicted, data.test.labels, strict=True))
    measured = round(manifest.metrics["test_accuracy"] * len(data.test))
    report(
        {
            "model": f"{ref.name} version {version} ({manifest.source.recipe})",
            "pictures": len(data.test),
            "right over HTTP": int(right),
            "right in training": measured,
            "accuracy over HTTP": right / len(data.test),
            "equal to the last picture": bool(right == measured),
            "seconds": time.perf_counter() - started,
        },
        arguments.json,
    )
    return 0 if right == measured else 1


def classify_all(service: RunningService, examples: Examples) -> list[int]:
    """The index of the best class of every example, asked by a few clients at once."""

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
