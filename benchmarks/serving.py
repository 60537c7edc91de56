"""Convoy beside what people would run instead: requests a second, latency, errors.

    python -m benchmarks.serving [--workloads w1,w2] [--plan auto] [--seconds 4] [--repetitions 3]
                                 [--json FILE]

W1 is a 28×28 PNG of Fashion-MNIST and the ``cnn`` recipe, W2 a 500×375 JPEG photograph and a
trained ResNet-18 at 224×224. Both models are trained under ``var/benchmarks`` when they are not
there yet (some minutes). Every server has two workers and runs all the time; wrk speaks to one
after the other, in turns, so that a noisy moment hits all. Before a figure is taken, all
servers must agree on the pictures. Beside FILE the raw figures (``.details.json``), a table
(``.md``) and a plot (``.png``) are written.
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

from benchmarks.common import RunningService, free_port, machine, parser
from registry.bundle import Bundle, open_bundle
from registry.contract import ModelRef
from registry.home import Home
from registry.plans.choice import AUTO, Planner
from registry.preprocess import decode_image
from registry.releases import read_release, version_folder

ROOT = Path(__file__).parent.parent
HOME = ROOT / "var" / "benchmarks"
CONNECTIONS = (1, 8, 32)
CROWD = (128, 512)
WORKERS = 2
AFTER_CROWD_S = 5.0  # what is still under way for those who left is not for the next to wait for
CEILING_S = 3.0
Figures = dict[str, float]

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
    options.add_argument("--plan", default=AUTO, help="serve by this one instead of the fastest")
    options.add_argument("--seconds", type=float, default=4.0, help="of one measurement")
    options.add_argument("--repetitions", type=int, default=3)
    arguments = options.parse_args()
    results: dict[str, Any] = {}
    details: dict[str, Any] = {
        "where": machine(),
        "command": f"python -m benchmarks.serving {' '.join(sys.argv[1:])}",
    }
    os.environ["CONVOY_PLAN"] = arguments.plan  # read by all that is started from here
    for workload in arguments.workloads.split(","):
        bundle = prepare(workload)
        details[workload] = found = measure(bundle, arguments.seconds, arguments.repetitions)
        results[workload] = found.pop("medians")
    table = "\n".join(line for name in results for line in describe(name, results, details))
    print(table)
    if arguments.json:
        write(arguments.json, results, details, table)
    return 0


def prepare(workload: str) -> Bundle:
    """The trained, promoted and pulled version of a workload; made when it is not there."""
    model, training = TRAINING[workload]
    home = Home(HOME)
    champion = ModelRef(model, alias="champion")
    if read_release(home.models, champion) is None:
        if workload == "w2":
            _run("benchmarks.photographs", str(HOME / "photographs"))
        _run("training", *training, "--model", model)
        _run("registry", "promote", model, "challenger")
        _run("registry", "pull", f"models:/{model}@champion")
    release = read_release(home.models, champion)
    assert release is not None
    (version,) = release.versions
    bundle = open_bundle(
        version_folder(home.models, model, version.version), version.manifest_sha256
    )
    _run("registry", "plan", f"{model}@champion")
    return bundle


def _run(*arguments: str) -> None:
    print(f"python -m {' '.join(arguments)}", file=sys.stderr)
    environment = {**os.environ, "CONVOY_HOME": str(HOME), "CONVOY_WORKERS": str(WORKERS)}
    subprocess.run([sys.executable, "-m", *arguments], check=True, env=environment)


def measure(bundle: Bundle, seconds: float, repetitions: int) -> dict[str, Any]:
    """Everything about one workload: medians by server and connections, and the rest by name."""
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
        agreement = {
            name: agree(servers["textbook"], port, pictures)
            for name, port in servers.items()
            if name != "noop"
        }
        runs: dict[str, dict[int, list[Figures]]] = {name: {} for name in servers}
        before = stages(service.port)
        turn = [(connections, name) for connections in CONNECTIONS for name in servers]
        turn += [(connections, "convoy") for connections in CROWD]
        jobs = turn * repetitions
        for connections, name in tqdm(jobs, unit="run", desc=model, disable=None):
            # Of a crowd, whose requests wait long, a short window would count too few.
            window_s = seconds if connections in CONNECTIONS else 3 * seconds
            figures = wrk(servers[name], connections, window_s, pictures)
            runs[name].setdefault(connections, []).append(figures)
            if connections in CROWD:
                time.sleep(AFTER_CROWD_S)
        after = stages(service.port)
        memory_mb = [process.memory_full_info().pss / 1e6 for process in tree(service.process)]
        with tempfile.NamedTemporaryFile() as file:
            file.write(multipart(pictures))
            file.flush()
            many = [
                wrk(service.port, 8, seconds, [Path(file.name)], f"multipart/form-data; {BOUNDARY}")
                for _ in range(repetitions)
            ]
        plan = served_plan(service.port, model)
    return {
        "medians": {
            name: {str(connections): median(found) for connections, found in by.items()}
            for name, by in runs.items()
        },
        "runs": runs,
        "largest difference to the textbook's probabilities": agreement,
        "plan": plan,
        "stages, mean ms": {
            name: 1000 * (after[name][0] - before[name][0]) / (after[name][1] - before[name][1])
            for name in after
        },
        "pictures/s, 32 in a request": median(many)["rps"] * len(pictures),
        "memory of the process tree, MB": sum(memory_mb),
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
    """The port of a server that was started for this, and ends with it."""
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


def ask(port: int, body: bytes, path: str = "/v1/classify") -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", path, body, {"Content-Type": "application/octet-stream"})
    data = connection.getresponse().read()
    connection.close()
    return json.loads(data) if path == "/v1/classify" else None


def agree(reference: int, port: int, pictures: list[Path]) -> float:
    """The largest difference in probability between two servers.

    Ends the benchmark when they disagree about the best class of a picture that is not nearly a
    tie: a comparison of the speed of different answers says nothing.
    """
    worst = 0.0
    for picture in pictures:
        ours, theirs = (
            ask(each, picture.read_bytes())["predictions"] for each in (port, reference)
        )
        probabilities = {each["index"]: each["probability"] for each in theirs}
        worst = max(
            worst,
            *(abs(each["probability"] - probabilities.get(each["index"], 0.0)) for each in ours),
        )
        margin = theirs[0]["probability"] - theirs[1]["probability"]
        if ours[0]["index"] != theirs[0]["index"] and margin > 0.1:
            raise SystemExit(f"{picture}: {ours[0]} here, {theirs[0]} by the textbook")
    return worst


def wrk(
    port: int, connections: int, seconds: float, bodies: list[Path], content_type: str = ""
) -> Figures:
    environment = {**os.environ, "WRK_BODIES": "\n".join(map(str, bodies))}
    if content_type:
        environment["WRK_CONTENT_TYPE"] = content_type
    done = subprocess.run(
        [
            *("wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s"),
            *("-s", str(ROOT / "benchmarks" / "wrk.lua")),
            f"http://127.0.0.1:{port}/v1/classify",
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    figures: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def median(runs: list[Figures]) -> Figures:
    found = {
        key: statistics.median(run[key] for run in runs) for key in ("rps", "p50_ms", "p99_ms")
    }
    return {**found, "errors": sum(run["errors"] for run in runs)}


def stages(port: int) -> dict[str, tuple[float, float]]:
    """Sum of seconds and count of each stage, from the service's metrics."""
    time.sleep(1.0)  # every worker writes its notes at least once in half a second
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


def served_plan(port: int, model: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", f"/v1/models/{model}")
    plan: str = json.loads(connection.getresponse().read())["plan"]
    connection.close()
    return plan


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
    """Pictures a second if the cores did nothing but decode and compute: a process on each core."""
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
    """Seconds of one core for one picture, decoded, and computed in a batch of 8."""
    bundle = open_bundle(Path(folder))
    classifier = Planner(Home(HOME).plans, "cpu", 1, os.environ["CONVOY_PLAN"]).load(bundle)
    assert classifier.plan == plan
    encoded = [bundle.read(each.file) for each in bundle.golden()][:8]
    import numpy as np

    pictures, started = 0, time.perf_counter()
    while time.perf_counter() - started < CEILING_S:
        pixels = [decode_image(data, bundle.manifest.preprocess) for data in encoded]
        classifier.classify(np.stack(pixels))
        pictures += len(pixels)
    return (time.perf_counter() - started) / pictures


def describe(workload: str, results: dict[str, Any], details: dict[str, Any]) -> list[str]:
    """Lines of Markdown: the table, and each promise beside its figure."""
    medians, found = results[workload], details[workload]
    lines = [
        f"## {workload.upper()}: {TRAINING[workload][0]}, plan {found['plan']}",
        "",
        "| server | connections | requests/s | p50 ms | p99 ms | errors |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {connections} | {row['rps']:,.0f} | {row['p50_ms']:.2f} | "
            f"{row['p99_ms']:.1f} | {row['errors']:.0f} |"
            for name, by in medians.items()
            for connections, row in by.items()
        ),
        "",
        "| promise | wanted | measured |",
        "|---|---|---|",
    ]
    convoy = medians["convoy"]
    peak = max(row["rps"] for row in convoy.values())

    def ratio(other: str, connections: str = "32", figure: str = "rps") -> float:
        return float(convoy[connections][figure] / medians[other][connections][figure])

    promises = [
        ("p99 at 8 connections / textbook's", "< 1", ratio("textbook", "8", "p99_ms")),
        ("p99 at 32 connections / textbook's", "< 1", ratio("textbook", "32", "p99_ms")),
        ("requests/s at 512 connections / peak", "≥ 0.9", convoy["512"]["rps"] / peak),
        ("requests that failed", "0", sum(row["errors"] for row in convoy.values())),
        ("requests/s at 32 / textbook with the same engine", "–", ratio("textbook_same_engine")),
        ("start to ready, s", "≤ 4", found["start to ready, s"]),
    ]
    if workload == "w1":
        promises += [
            ("requests/s at 32 / Flask no-op", "≥ 0.8", ratio("noop")),
            ("requests/s at 32 / textbook", "≥ 2.5", ratio("textbook")),
            ("requests/s at 32 / FastAPI", "≥ 1.5", ratio("fastapi")),
            ("p50 at 1 connection / textbook's", "≤ 1", ratio("textbook", "1", "p50_ms")),
            (
                "pictures/s, 32 in a request / singly",
                "≥ 2",
                found["pictures/s, 32 in a request"] / convoy["32"]["rps"],
            ),
            (
                "memory of the process tree per worker, MB",
                "≤ 450",
                found["memory of the process tree, MB"] / WORKERS,
            ),
        ]
    else:
        promises += [
            ("requests/s at 32 / textbook", "≥ 5 (bf16), ≥ 8 (int8)", ratio("textbook")),
            (
                "requests/s at 32 / ceiling of decode and forward",
                "≥ 0.8",
                convoy["32"]["rps"] / found["ceiling, pictures/s"],
            ),
        ]
    lines += [f"| {what} | {wanted} | {value:.2f} |" for what, wanted, value in promises]
    mean = ", ".join(f"{name} {value:.3f}" for name, value in found["stages, mean ms"].items())
    return [*lines, "", f"Stages, mean ms over all runs: {mean}.", ""]


def write(file: Path, results: dict[str, Any], details: dict[str, Any], table: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")
    file.with_suffix(".details.json").write_text(json.dumps(details, indent=2) + "\n")
    where = ", ".join(f"{key} {value}" for key, value in details["where"].items())
    file.with_suffix(".md").write_text(f"# Serving\n\n{where}\n\n{table}\n")
    draw(results, file.with_suffix(".png"))


def draw(results: dict[str, Any], file: Path) -> None:
    """Requests a second against connections, a panel for each workload."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(results), figsize=(6 * len(results), 4.2), layout="constrained", squeeze=False
    )
    for axes, (workload, medians) in zip(panels[0], results.items(), strict=True):
        for name, by in medians.items():
            if workload == "w2" and name == "noop":
                continue  # it looks at no picture, and would flatten all the others
            style = {"color": "0.6", "linestyle": "--"} if name == "noop" else {}
            width = 2.5 if name == "convoy" else 1.2
            axes.plot(
                [int(connections) for connections in by],
                [row["rps"] for row in by.values()],
                marker="o",
                label=name.replace("_", " "),
                linewidth=width,
                **style,
            )
        axes.set(xscale="log", xlabel="connections", ylabel="requests/s", title=workload.upper())
        axes.set_xticks([1, 8, 32, 128, 512], ["1", "8", "32", "128", "512"])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
