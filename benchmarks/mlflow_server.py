"""Compares MLflow's own scoring server with Convoy, for the same version and the same client.

    python -m benchmarks.mlflow_server [--json FILE] [--workloads w1,w2] [--connections 1,8,32]
                                       [--repetitions 3] [--seconds 4]

The workloads W1 and W2 are those of ``benchmarks.serving``. The servers are

- ``mlflow``: ``mlflow models serve`` with two workers, which runs the version's python_function;
- ``convoy``: Convoy's ``/invocations`` with two workers and the plan that it chooses here;
- ``convoy_eager``: the same with the plan ``torch-eager``, which the python_function uses.

Each server gets ``dataframe_split`` with one picture in base64. All servers run all the time. The
load goes to one server after another, in a different order in each repetition. Figures are medians
of the repetitions.
"""

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import psutil
from tqdm import tqdm

from benchmarks.closed_loop import Figures
from benchmarks.common import (
    START_TIMEOUT_S,
    free_port,
    machine,
    parser,
    running_service,
    served_plan,
)
from benchmarks.http_servers.servers import Server
from benchmarks.http_servers.windows import agree, measure
from benchmarks.protocols import scoring
from benchmarks.serving import HOME, WORKERS, prepare
from registry.model.bundle import Bundle
from registry.store.bundle_upload import SIGNATURE

COLUMNS = ("rps", "p50_ms", "p99_ms", "cpu_ms", "client_cores", "other_cores")


@contextmanager
def mlflow_server(bundle: Bundle) -> Iterator[Server]:
    """``mlflow models serve`` with the bundle; it ends with the context."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        path = Path(folder, "model")
        mlflow.pyfunc.save_model(
            path,
            loader_module="registry.model.mlflow_pyfunc",
            data_path=str(bundle.folder),
            signature=SIGNATURE,
            pip_requirements=[],
        )
        port = free_port()
        process = psutil.Popen(
            [
                *(sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"),
                *("--model-uri", str(path), "--port", str(port), "--workers", str(WORKERS)),
            ],
            env={
                **os.environ,
                "CONVOY_HOME": str(HOME),
                "OMP_NUM_THREADS": "1",
                # MLflow starts uvicorn by its name.
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _answers(port):
                if time.monotonic() > deadline or process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"MLflow did not start:\n{log.read().decode()[-3000:]}")
                time.sleep(0.2)
            yield Server(port, process)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in (*process.children(recursive=True), process):
                    each.terminate()
            process.wait(60)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def compare(workload: str, arguments: Any) -> dict[str, Any]:
    """The medians and the raw figures of one workload."""
    bundle = prepare(workload)
    model = bundle.manifest.model
    ref = f"models:/{model}@champion"
    with (
        running_service(HOME, ref, WORKERS) as fastest,
        running_service(HOME, ref, WORKERS, plan="torch-eager") as eager,
        mlflow_server(bundle) as theirs,
    ):
        servers = {
            "mlflow": theirs,
            "convoy": Server(fastest.port, fastest.process),
            "convoy_eager": Server(eager.port, eager.process),
        }
        plan = served_plan(fastest, model)
        found, _ = agree({"convoy": servers["convoy"]}, bundle)
        pictures = [bundle.read(each.file) for each in bundle.golden()]
        questions = [
            scoring(picture, list(each.right))
            for picture, each in zip(pictures, found, strict=True)
        ]
        for server in servers.values():
            measure(server, 8, 2.0, questions)  # warms up
        runs: dict[str, dict[str, list[Figures]]] = {name: {} for name in servers}
        order = random.Random(0)
        jobs = [
            (connections, name)
            for _ in range(arguments.repetitions)
            for connections in arguments.connections.split(",")
            for name in order.sample(list(servers), len(servers))
        ]
        for connections, name in tqdm(jobs, unit="run", disable=None):
            figures = measure(servers[name], int(connections), arguments.seconds, questions)
            runs[name].setdefault(connections, []).append(figures)
    medians = {
        name: {
            connections: {
                **{key: statistics.median(each[key] for each in figures) for key in COLUMNS},
                "failed": sum(each["failed"] + each["refused"] for each in figures),
            }
            for connections, figures in by.items()
        }
        for name, by in runs.items()
    }
    return {"model": model, "plan": plan, "medians": medians, "runs": runs}


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--workloads", default="w1,w2")
    options.add_argument("--connections", default="1,8,32")
    options.add_argument("--repetitions", type=int, default=3)
    options.add_argument("--seconds", type=float, default=4.0)
    arguments = options.parse_args()
    results: dict[str, Any] = {
        **machine(),
        "command": f"python -m benchmarks.mlflow_server {' '.join(sys.argv[1:])}".strip(),
        "versions": {"mlflow": version("mlflow")},
    }
    for workload in arguments.workloads.split(","):
        results[workload] = compare(workload, arguments)
        show(workload, results[workload]["medians"])
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def show(workload: str, medians: dict[str, dict[str, Figures]]) -> None:
    columns = (*COLUMNS, "failed")
    print(f"\n{workload:<6}{'server':<14}" + "".join(f"{name:>13}" for name in columns))
    for connections in next(iter(medians.values())):
        for name, by in medians.items():
            shown = "".join(f"{by[connections][key]:>13,.4g}" for key in columns)
            print(f"{connections:<6}{name:<14}{shown}")


if __name__ == "__main__":
    sys.exit(main())
