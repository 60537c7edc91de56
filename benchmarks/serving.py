"""Compares Convoy with simpler servers: requests per second, latency and errors.

    python -m benchmarks.serving [--workloads w1,w2] [--plan auto] [--seconds 4] [--repetitions 3]
                                 [--json FILE]

W1 is a 28×28 PNG of Fashion-MNIST and the ``cnn`` recipe. W2 is a 500×375 JPEG photograph and a
trained ResNet-18 at 224×224. If they do not exist, both models are trained in ``var/benchmarks``,
which takes some minutes. Every server has two workers and runs all the time. The client measures
the servers in turn, so that a noisy moment affects all of them. Before that, all servers must give
the same labels for the pictures. Requests/s count right answers only (``benchmarks.closed_loop``).
A row with refused, wrong or lost requests is marked, is used in no ratio, and makes the exit status
1. Next to FILE are written the raw figures (``.details.json``), a table (``.md``) and a plot
(``.png``).
"""

import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from benchmarks.closed_loop import FAILURES, Figures, load, post
from benchmarks.common import RunningService, free_port, machine, parser, served_plan
from benchmarks.serving_report import conclude
from registry.core.paths import Paths
from registry.delivery.deployment import read_deployment, version_folder
from registry.model.bundle import Bundle, open_bundle
from registry.model.image.decode import decode_image
from registry.model.plans.planner import AUTO, Planner
from registry.model.refs import ModelRef

ROOT = Path(__file__).parent.parent
HOME = ROOT / "var" / "benchmarks"
CONNECTIONS = (1, 8, 32)
MANY_CONNECTIONS = (128, 512)
WORKERS = 2
DRAIN_S = 5.0  # the service finishes requests of closed connections before the next run
CEILING_S = 3.0
NEAR_TIE = 0.1
"""Two engines may rank labels differently if their probabilities differ by less than this."""
Agreed = list[frozenset[str]]
"""The right labels for each picture."""

TRAINING = {
    "w1": ("fashion", ["--data", "fashion-mnist", "--recipe", "cnn"]),
    "w2": (
        "photographs",
        [
            *("--data", f"folder:{HOME / 'photographs'}", "--image-size", "224"),
            *("--recipe", "resnet18", "--set", "epochs=8"),
        ],
    ),
}


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--workloads", default="w1,w2")
    options.add_argument("--plan", default=AUTO, help="serve with this plan, not the fastest")
    options.add_argument("--seconds", type=float, default=4.0, help="of one measurement")
    options.add_argument("--repetitions", type=int, default=3)
    arguments = options.parse_args()
    results: dict[str, Any] = {}
    details: dict[str, Any] = {
        "where": machine(),
        "command": f"python -m benchmarks.serving {' '.join(sys.argv[1:])}",
    }
    os.environ["CONVOY_PLAN"] = arguments.plan  # every process that is started here reads it
    for workload in arguments.workloads.split(","):
        bundle = prepare(workload)
        details[workload] = found = measure(bundle, arguments.seconds, arguments.repetitions)
        results[workload] = found.pop("medians")
    return conclude(results, details, arguments.json)


def prepare(workload: str) -> Bundle:
    """The trained, promoted and pulled version of a workload; made if it does not exist."""
    model, training = TRAINING[workload]
    paths = Paths(HOME)
    champion = ModelRef(model, alias="champion")
    if read_deployment(paths.models, champion) is None:
        if workload == "w2":
            _run("benchmarks.photographs", str(HOME / "photographs"))
        _run("training", *training, "--model", model)
        _run("registry", "promote", model, "challenger")
        _run("registry", "pull", f"models:/{model}@champion")
    deployment = read_deployment(paths.models, champion)
    assert deployment is not None
    (version,) = deployment.versions
    bundle = open_bundle(
        version_folder(paths.models, model, version.version), version.manifest_sha256
    )
    _run("registry", "plan", f"{model}@champion")
    return bundle


def _run(*arguments: str) -> None:
    print(f"python -m {' '.join(arguments)}", file=sys.stderr)
    environment = {**os.environ, "CONVOY_HOME": str(HOME), "CONVOY_WORKERS": str(WORKERS)}
    subprocess.run([sys.executable, "-m", *arguments], check=True, env=environment)


def measure(bundle: Bundle, seconds: float, repetitions: int) -> dict[str, Any]:
    """All figures of one workload: medians by server and connections, and others by name."""
    model = bundle.manifest.model
    pictures = [bundle.folder / each.file for each in bundle.golden()]
    with ExitStack() as stack:
        service = RunningService(
            HOME, f"models:/{model}@champion", WORKERS, pull=False, plan=os.environ["CONVOY_PLAN"]
        )
        stack.callback(service.stop)
        servers = {
            "convoy": service.port,
            **{name: stack.enter_context(peer(name, bundle)) for name in PEERS},
        }
        agreed, difference = agree(servers, pictures)
        bodies = [picture.read_bytes() for picture in pictures]
        questions = [post(body, [right]) for body, right in zip(bodies, agreed, strict=True)]
        without_labels = [post(body, ()) for body in bodies]
        runs: dict[str, dict[int, list[Figures]]] = {name: {} for name in servers}
        before = stages(service.port)
        turn = [(connections, name) for connections in CONNECTIONS for name in servers]
        turn += [(connections, "convoy") for connections in MANY_CONNECTIONS]
        jobs = turn * repetitions
        for connections, name in tqdm(jobs, unit="run", desc=model, disable=None):
            # Requests of many connections wait long: a short window would count too few answers.
            window_s = seconds if connections in CONNECTIONS else 3 * seconds
            sent = without_labels if name == "noop" else questions
            figures = load(servers[name], connections, window_s, sent)
            runs[name].setdefault(connections, []).append(figures)
            if connections in MANY_CONNECTIONS:
                time.sleep(DRAIN_S)
        after = stages(service.port)
        memory_mb = [process.memory_full_info().pss / 1e6 for process in tree(service.process)]
        all_at_once = post(multipart(pictures), agreed, f"multipart/form-data; {BOUNDARY}")
        many = [load(service.port, 8, seconds, [all_at_once]) for _ in range(repetitions)]
        plan = served_plan(service, model)
    return {
        "model": model,
        "medians": {
            name: {str(connections): median(found) for connections, found in by.items()}
            for name, by in runs.items()
        },
        "runs": runs,
        "largest difference to the textbook's probabilities": difference,
        "plan": plan,
        "stages, mean ms": {
            name: 1000 * (after[name][0] - before[name][0]) / (after[name][1] - before[name][1])
            for name in after
        },
        "many in a request": median(many) | {"pictures": len(pictures)},
        "memory of the process tree per worker, MB": sum(memory_mb) / WORKERS,
        "start to ready, s": service.start_to_ready_s,
        "ceiling, pictures/s": ceiling(bundle, plan),
    }


PEERS = {
    "textbook": ["gunicorn", "-k", "gthread", "--threads", "4", "benchmarks.peers.textbook:app"],
    "textbook_same_engine": [
        *("gunicorn", "-k", "gthread", "--threads", "4", "benchmarks.peers.engine:app")
    ],
    "fastapi": ["uvicorn", "--log-level", "warning", "benchmarks.peers.fast:app"],
    "noop": ["gunicorn", "-k", "gthread", "--threads", "4", "benchmarks.peers.noop:app"],
}


@contextmanager
def peer(name: str, bundle: Bundle) -> Iterator[int]:
    """Start the server ``name`` while the block runs; gives its port."""
    port = free_port()
    program, *options = PEERS[name]
    listen = ["--bind", f"127.0.0.1:{port}", "--no-control-socket", "--keep-alive", "75"]
    if program == "uvicorn":
        listen = ["--port", str(port)]
    environment = {
        **os.environ,
        "BENCH_BUNDLE": str(bundle.folder),
        "CONVOY_HOME": str(HOME),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", program, "--workers", str(WORKERS), *listen, *options],
            env=environment,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 60
            while not answers(port):
                if time.monotonic() > deadline or process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"{name} did not start:\n{log.read().decode()[-2000:]}")
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait(30)


def answers(port: int) -> bool:
    try:
        ask(port, b"", "/")
    except OSError:
        return False
    return True


def ask(port: int, body: bytes, path: str = "/v1/classify") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", path, body, {"Content-Type": "application/octet-stream"})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, data


def agree(servers: dict[str, int], pictures: list[Path]) -> tuple[Agreed, dict[str, float]]:
    """The right labels for each picture, and each server's largest difference in probability.

    The textbook's answer is the reference: its best label is right, and so is a label with nearly
    the same probability. The benchmark ends if another server disagrees, because it makes no sense
    to compare the speed of servers that give different answers.
    """
    agreed: Agreed = []
    difference = {name: 0.0 for name in servers if name != "noop"}
    for picture in pictures:
        data = picture.read_bytes()
        reference = predictions(servers["textbook"], data)
        best = max(reference.values())
        right = frozenset(label for label, each in reference.items() if best - each <= NEAR_TIE)
        agreed.append(right)
        for name in difference:
            found = predictions(servers[name], data)
            if max(found, key=found.__getitem__) not in right:
                raise SystemExit(f"{picture}: {name} answers {found}, the textbook {reference}")
            off = max(abs(each - reference.get(label, 0.0)) for label, each in found.items())
            difference[name] = max(difference[name], off)
    return agreed, difference


def predictions(port: int, picture: bytes) -> dict[str, float]:
    """The probabilities by label in the answer of the server on ``port``."""
    status, data = ask(port, picture)
    if status != 200:
        raise SystemExit(f"port {port} answered {status}: {data[:500]!r}")
    return {each["label"]: each["probability"] for each in json.loads(data)["predictions"]}


def median(runs: list[Figures]) -> Figures:
    """Medians of rates and times, and sums of right answers and failures, over the runs."""
    found = {
        key: statistics.median(run[key] for run in runs)
        for key in ("rps", "p50_ms", "p99_ms", "client_cores")
    }
    return found | {key: sum(run[key] for run in runs) for key in ("right", *FAILURES)}


def stages(port: int) -> dict[str, tuple[float, float]]:
    """The sum of seconds and the count of each stage, from the service's metrics."""
    time.sleep(1.0)  # each worker writes its metrics at least every half second
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        for kind in ("sum", "count"):
            if line.startswith(f"convoy_stage_seconds_{kind}{{"):
                stage = line.partition('stage="')[2].partition('"')[0]
                values = found.setdefault(stage, {"sum": 0.0, "count": 0.0})
                values[kind] += float(line.rpartition(" ")[2])
    return {stage: (values["sum"], values["count"]) for stage, values in found.items()}


def tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


BOUNDARY = "boundary=a-boundary"


def multipart(pictures: list[Path]) -> bytes:
    parts = [
        b"--a-boundary\r\n"
        b'Content-Disposition: form-data; name="image"; filename="picture"\r\n\r\n'
        + picture.read_bytes()
        + b"\r\n"
        for picture in pictures
    ]
    return b"".join(parts) + b"--a-boundary--\r\n"


def ceiling(bundle: Bundle, plan: str) -> float:
    """Pictures per second if each core only decodes and computes, in a process of its own."""
    code = "import sys; from benchmarks.serving import cost; print(cost(sys.argv[1], sys.argv[2]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(bundle.folder), plan],
            env={**os.environ, "CONVOY_HOME": str(HOME), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(WORKERS)
    ]
    return sum(1 / float(process.communicate()[0]) for process in processes)


def cost(folder: str, plan: str) -> float:
    """Seconds of one core to decode a picture and classify it in a batch of 8."""
    bundle = open_bundle(Path(folder))
    classifier = Planner(Paths(HOME).plans, "cpu", 1, os.environ["CONVOY_PLAN"]).load(bundle)
    assert classifier.plan == plan
    encoded = [bundle.read(each.file) for each in bundle.golden()][:8]
    import numpy as np

    pictures, started = 0, time.perf_counter()
    while time.perf_counter() - started < CEILING_S:
        pixels = [decode_image(data, bundle.manifest.preprocess) for data in encoded]
        classifier.classify(np.stack(pixels))
        pictures += len(pixels)
    return (time.perf_counter() - started) / pictures


if __name__ == "__main__":
    sys.exit(main())
