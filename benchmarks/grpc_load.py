"""Compares gRPC with HTTP by a compiled client, nghttp2's ``h2load``, on one service.

    python -m benchmarks.grpc_load [--json FILE] [--workloads w1,w2] [--repetitions 5]
                                   [--seconds 4]

The workloads W1 and W2 are those of ``benchmarks.serving``. Both sides send the same encoded
picture: gRPC as ``ModelInfer`` with raw contents, HTTP/1.1 as the body of ``/v1/classify``. W1 has
32 connections, W2 has 8, with one request at a time on each. The load goes to one side after the
other, and the order changes with each repetition. ``cpu_ms`` is the CPU time of the service's
processes per request, ``client_ms`` that of h2load. ``ratio`` is the median, over the repetitions,
of gRPC's requests a second divided by those of HTTP.
"""

import json
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common import RunningService, free_port, machine, parser, running_service
from benchmarks.http_servers.servers import Server
from benchmarks.http_servers.windows import fastest_plan
from benchmarks.serving import HOME, WORKERS, prepare
from service.observability.metrics import FLUSH_S
from service.protocols.grpc_v2 import inference_pb2 as pb

CONNECTIONS = {"w1": 32, "w2": 8}
CALL = "/inference.GRPCInferenceService/ModelInfer"
COLUMNS = ("rps", "p50_ms", "p99_ms", "cpu_ms", "client_ms")
_COUNTED = re.compile(r'convoy_requests_total\{.*outcome="ok",protocol="(\w+)"\} ([\d.e+]+)')
Figures = dict[str, float]


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--workloads", default="w1,w2")
    options.add_argument("--repetitions", type=int, default=5)
    options.add_argument("--seconds", type=int, default=4)
    arguments = options.parse_args()
    if not shutil.which("h2load"):
        raise SystemExit("there is no h2load; install Debian's package nghttp2-client")
    results: dict[str, Any] = {
        **machine(),
        "command": f"python -m benchmarks.grpc_load {' '.join(sys.argv[1:])}".strip(),
    }
    for workload in arguments.workloads.split(","):
        results[workload] = compare(workload, arguments.repetitions, arguments.seconds)
        show(workload, results[workload])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def compare(workload: str, repetitions: int, seconds: int) -> dict[str, Any]:
    """The medians and the raw figures of both sides on one workload."""
    bundle = prepare(workload)
    model, picture = bundle.manifest.model, bundle.read(bundle.golden()[0].file)
    plan, port = fastest_plan(workload), free_port()
    runs: dict[str, list[Figures]] = {"grpc": [], "http": []}
    with (
        running_service(
            HOME, f"models:/{model}@champion", WORKERS, plan=plan, CONVOY_GRPC_PORT=str(port)
        ) as service,
        tempfile.TemporaryDirectory(prefix="convoy-grpc-") as folder,
    ):
        commands = dict(_commands(Path(folder), model, picture, port, service.port))
        for command in commands.values():
            measure(service, command, CONNECTIONS[workload], 1)  # warms up
        for repetition in tqdm(range(repetitions), unit="repetition", disable=None):
            for side in ("grpc", "http") if repetition % 2 else ("http", "grpc"):
                found = measure(service, commands[side], CONNECTIONS[workload], seconds)
                runs[side].append(found)
    ratios = [a["rps"] / b["rps"] for a, b in zip(runs["grpc"], runs["http"], strict=True)]
    medians = {
        side: {key: statistics.median(each[key] for each in found) for key in COLUMNS}
        for side, found in runs.items()
    }
    return {
        "model": model,
        "plan": plan,
        "connections": CONNECTIONS[workload],
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "medians": medians,
        "runs": runs,
    }


def _commands(
    folder: Path, model: str, picture: bytes, grpc_port: int, http_port: int
) -> Iterator[tuple[str, list[str]]]:
    """The end of h2load's command for each side."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[1])
    raw = struct.pack("<I", len(picture)) + picture
    message = pb.ModelInferRequest(
        model_name=model, inputs=[tensor], raw_input_contents=[raw]
    ).SerializeToString()
    call, body = folder / "call", folder / "picture"
    call.write_bytes(b"\0" + struct.pack(">I", len(message)) + message)
    body.write_bytes(picture)
    headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    yield "grpc", ["-d", str(call), *headers, f"http://127.0.0.1:{grpc_port}{CALL}"]
    headers = ["-H", "content-type: application/octet-stream"]
    url = f"http://127.0.0.1:{http_port}/v1/classify"
    yield "http", ["--h1", "-d", str(body), *headers, url]


def measure(service: RunningService, command: list[str], connections: int, seconds: int) -> Figures:
    """The figures of one window of load.

    Raises:
        SystemExit: the service has answered a request with an error.
    """
    server = Server(service.port, service.process)
    with tempfile.NamedTemporaryFile(prefix="convoy-h2load-") as log:
        answered, used_s, own_s = _answered(service), server.cpu_s(), _children_s()
        started = time.perf_counter()
        subprocess.run(
            [
                *("h2load", "-t", "1", "-m", "1", "-c", str(connections), "-D", str(seconds)),
                *(f"--log-file={log.name}", *command),
            ],
            check=True,
            capture_output=True,
        )
        elapsed_s = time.perf_counter() - started
        used_s, own_s = server.cpu_s() - used_s, _children_s() - own_s
        time.sleep(2 * FLUSH_S)  # until the workers have written their metrics
        rows = np.loadtxt(log.name, dtype=np.int64, ndmin=2)
    failed = int((rows[:, 1] != 200).sum()), len(rows) - (_answered(service) - answered)
    if failed[0] or failed[1] > 0:  # a call that fails has the status 200, too
        raise SystemExit(f"{max(failed)} of {len(rows)} requests failed")
    p50, p99 = np.percentile(rows[:, 2], (50, 99)) / 1000
    return {
        "rps": len(rows) / elapsed_s,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "cpu_ms": 1000 * used_s / len(rows),
        "client_ms": 1000 * own_s / len(rows),
    }


def _answered(service: RunningService) -> int:
    """How many requests got predictions, by the service's own metrics."""
    connection = service.connect()
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return int(sum(float(found[2]) for found in _COUNTED.finditer(text)))


def _children_s() -> float:
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def show(workload: str, found: dict[str, Any]) -> None:
    print(f"\n{workload:<8}" + "".join(f"{name:>12}" for name in COLUMNS))
    for side, figures in found["medians"].items():
        print(f"{side:<8}" + "".join(f"{figures[key]:>12,.4g}" for key in COLUMNS))
    low, high = found["ratio_range"]
    print(f"gRPC answers {found['ratio']:.2f} ({low:.2f} to {high:.2f}) of HTTP's requests")


if __name__ == "__main__":
    sys.exit(main())
