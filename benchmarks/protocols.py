"""Compares the protocols of one service, and the forms of input of each.

    python -m benchmarks.protocols [--json FILE] [--workloads w1,w2] [--forms v1,v2_bytes,…]
                                   [--connections 32] [--repetitions 5] [--seconds 3]

The workloads W1 and W2 are those of ``benchmarks.serving``. One service with two workers answers
all forms. The load goes to one form after another, in a different order in each repetition. The
figures are medians of the repetitions. ``ratio`` is the median, over the repetitions, of a form's
pictures a second divided by those of ``v1`` in the same repetition. ``cpu_ms`` is the CPU time of
the service's processes per request. ``client_cores`` is how many cores the load used.

Forms named ``…_32`` send 32 pictures in one request; their ratio, too, compares pictures.
"""

import base64
import json
import random
import statistics
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.closed_loop import Figures, Question, post
from benchmarks.common import machine, parser, running_service, served_plan
from benchmarks.http_servers.servers import Server
from benchmarks.http_servers.windows import agree, fastest_plan, measure
from benchmarks.serving import HOME, WORKERS, prepare
from registry.model.bundle import Bundle
from registry.model.image.decode import decode_image

JSON, BINARY = "application/json", "application/octet-stream"
MANY = 32
Labels = list[frozenset[str]]
COLUMNS = ("rps", "pictures", "ratio", "p50_ms", "p99_ms", "cpu_ms", "client_cores", "other_cores")


def tensor(model: str, datatype: str, shape: list[int], data: bytes, right: Labels) -> Question:
    """A request of the Open Inference Protocol in binary form, as tritonclient sends it."""
    parameters = {"binary_data_size": len(data)}
    inputs = [{"name": "x", "shape": shape, "datatype": datatype, "parameters": parameters}]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return post(
        head + data,
        right,
        BINARY,
        f"/v2/models/{model}/infer",
        "tensors",
        f"Inference-Header-Content-Length: {len(head)}\r\n",
    )


def in_json(model: str, picture: bytes, right: Labels) -> Question:
    data = [base64.b64encode(picture).decode()]
    inputs = [{"name": "x", "shape": [1], "datatype": "BYTES", "data": data}]
    body = json.dumps({"inputs": inputs}).encode()
    return post(body, right, JSON, f"/v2/models/{model}/infer", "tensors")


def scoring(picture: bytes, right: Labels) -> Question:
    body = json.dumps({"dataframe_split": {"columns": ["image"], "data": [[_text(picture)]]}})
    return post(body.encode(), right, JSON, "/invocations", "rows")


def v1_json(picture: bytes, right: Labels) -> Question:
    return post(json.dumps({"image": _text(picture)}).encode(), right, JSON)


def _text(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def forms(bundle: Bundle, questions: list[Question]) -> dict[str, list[Question]]:
    """Every form of the requests ``questions``, which are those of ``/v1/classify``."""
    manifest = bundle.manifest
    model, spec = manifest.model, manifest.preprocess
    pictures = [bundle.read(each.file) for each in bundle.golden()]
    right = [list(each.right) for each in questions]
    pixels = [decode_image(each, spec) for each in pictures]
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    floats = [((each / np.float32(255) - mean) / std).transpose(2, 0, 1) for each in pixels]
    each_form: dict[str, Callable[[int], Question]] = {
        "v1": lambda at: questions[at],
        "v1_json": lambda at: v1_json(pictures[at], right[at]),
        "v2_bytes": lambda at: tensor(
            model, "BYTES", [1], struct.pack("<I", len(pictures[at])) + pictures[at], right[at]
        ),
        "v2_json": lambda at: in_json(model, pictures[at], right[at]),
        "v2_uint8": lambda at: tensor(
            model, "UINT8", [1, *spec.shape], pixels[at].tobytes(), right[at]
        ),
        "v2_fp32": lambda at: tensor(
            model, "FP32", [1, *floats[at].shape], floats[at].tobytes(), right[at]
        ),
        "mlflow": lambda at: scoring(pictures[at], right[at]),
        "torchserve": lambda at: post(
            pictures[at], right[at], BINARY, f"/predictions/{model}", "object"
        ),
    }
    made = {name: [make(at) for at in range(len(pictures))] for name, make in each_form.items()}
    order = [at % len(pictures) for at in range(MANY)]
    many = np.stack([pixels[at] for at in order])
    rights = [label for at in order for label in right[at]]
    made["v2_uint8_32"] = [tensor(model, "UINT8", list(many.shape), many.tobytes(), rights)]
    return made


def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--workloads", default="w1,w2")
    options.add_argument("--forms", default="")
    options.add_argument("--connections", type=int, default=32)
    options.add_argument("--repetitions", type=int, default=5)
    options.add_argument("--seconds", type=float, default=3.0)
    arguments = options.parse_args()
    results: dict[str, Any] = {
        **machine(),
        "command": f"python -m benchmarks.protocols {' '.join(sys.argv[1:])}".strip(),
    }
    for workload in arguments.workloads.split(","):
        results[workload] = compare(workload, arguments)
        show(workload, results[workload]["medians"])
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def compare(workload: str, arguments: Any) -> dict[str, Any]:
    """The medians and the raw figures of every form on one workload."""
    bundle = prepare(workload)
    model, plan = bundle.manifest.model, fastest_plan(workload)
    with running_service(HOME, f"models:/{model}@champion", WORKERS, plan=plan) as service:
        assert served_plan(service, model) == plan
        server = Server(service.port, service.process)
        questions, _ = agree({"convoy": server}, bundle)
        requests = forms(bundle, questions)
        if arguments.forms:
            requests = {name: requests[name] for name in ("v1", *arguments.forms.split(","))}
        runs: dict[str, list[Figures]] = {name: [] for name in requests}
        order = random.Random(0)
        for sent in requests.values():
            measure(server, arguments.connections, 0.5, sent)  # warms up
        for _ in tqdm(range(arguments.repetitions), unit="repetition", disable=None):
            for name in order.sample(list(requests), len(requests)):
                found = measure(server, arguments.connections, arguments.seconds, requests[name])
                found["pictures"] = found["rps"] * len(requests[name][0].right)
                runs[name].append(found)
    for found in runs.values():
        for figures, base in zip(found, runs["v1"], strict=True):
            figures["ratio"] = figures["pictures"] / base["pictures"]
    medians = {
        name: {
            **{key: statistics.median(each[key] for each in found) for key in COLUMNS},
            "failed": sum(each["failed"] + each["refused"] for each in found),
        }
        for name, found in runs.items()
    }
    return {"model": model, "plan": plan, "medians": medians, "runs": runs}


def show(workload: str, medians: dict[str, Figures]) -> None:
    columns = (*COLUMNS, "failed")
    print(f"\n{workload:<14}" + "".join(f"{name:>13}" for name in columns))
    for name, figures in medians.items():
        print(f"{name:<14}" + "".join(f"{figures[key]:>13,.4g}" for key in columns))


if __name__ == "__main__":
    sys.exit(main())
