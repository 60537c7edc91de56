"""``make demo`` trains a model, classifies a picture with it, and serves until Ctrl-C.

It runs only commands that users run: the three command lines, and MLflow's own page. It uses the
champion of an earlier run if there is one. With CONVOY_DEMO_ONCE=1 it ends after the first answer
and leaves no process.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path

from registry.core.paths import Paths, convoy_paths
from registry.delivery.deployment import read_deployment
from registry.model.refs import ModelRef

MODEL = "fashion"
START_TIMEOUT_S = 90.0
UI_PORT = 5000


def main() -> int:
    paths = convoy_paths()
    os.environ["CONVOY_MODEL"] = f"models:/{MODEL}@champion"
    if read_deployment(paths.models, ModelRef(MODEL, alias="champion")) is None:
        train_first_champion()
    picture, label = save_test_picture(paths)
    service_url = f"http://127.0.0.1:{os.environ.get('CONVOY_PORT', '8080')}"
    ui_port = free_port(UI_PORT)
    with ExitStack() as stack:
        service = start(stack, "-m", "service", log=paths.root / "demo-service.log")
        page = start(
            stack,
            *("-m", "mlflow", "ui", "--workers", "1", "--port", str(ui_port)),
            *("--backend-store-uri", paths.tracking_uri),
            *("--default-artifact-root", paths.artifacts.as_uri()),
            log=paths.root / "demo-mlflow.log",
        )
        say("starting the service …")
        wait_for(f"{service_url}/readyz", service, paths.root / "demo-service.log")
        say(f"classifying a test picture of class {label}, which was not used for training:\n")
        command = [sys.executable, "-m", "convoy", "classify", str(picture)]
        subprocess.run([*command, "--url", service_url], check=True)
        answer = subprocess.run(
            [*command, "--url", service_url, "--json"], check=True, capture_output=True, text=True
        )
        print(f"\n  curl --data-binary @{os.path.relpath(picture)} {service_url}/v1/classify\n")
        wait_for(f"http://127.0.0.1:{ui_port}/health", page, paths.root / "demo-mlflow.log")
        print(f"  the page    {service_url}/")
        print(f"  mlflow ui   http://127.0.0.1:{ui_port}/\n")
        if json.loads(answer.stdout)["predictions"][0]["label"] != label:
            say(f"note: the model classified this {label} wrongly; no model is always right")
        if os.environ.get("CONVOY_DEMO_ONCE") == "1":
            return 0
        say("the service and MLflow are running; Ctrl-C stops them")
        try:
            return service.wait()
        except KeyboardInterrupt:
            return 0


def train_first_champion() -> None:
    """Train, promote and pull, each with the command that users type."""
    for arguments in (
        ("training", "--data", "fashion-mnist", "--recipe", "cnn", "--model", MODEL),
        ("registry", "promote", MODEL, "challenger"),
        ("registry", "pull", f"models:/{MODEL}@champion"),
    ):
        say(f"python -m {' '.join(arguments)}")
        subprocess.run([sys.executable, "-m", *arguments], check=True)


def save_test_picture(paths: Paths) -> tuple[Path, str]:
    """Save the first picture of the official test set; returns its file and its true label."""
    from registry.model.image.decode import encode_png
    from training.data.fashion_mnist import LABELS, load

    _, _, pictures, labels = load(None, paths.datasets)
    label = LABELS[labels[0]]
    path = paths.root / f"{label.lower().replace(' ', '-')}.png"
    path.write_bytes(encode_png(pictures[0][..., None]))
    return path, label


def start(stack: ExitStack, *arguments: str, log: Path) -> "subprocess.Popen[bytes]":
    """Start a process in its own process group, which ``stack`` ends with all its children."""
    output = stack.enter_context(log.open("wb"))
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment,
    )
    stack.callback(end_group, process)
    return process


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Send SIGTERM to the process, and then SIGKILL to all that are left of its group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=40)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until ``url`` answers 200; if it never does, exit with the last lines of the log."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    last_lines = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise SystemExit(f"{url} did not answer; the end of {log}:\n{last_lines}")


def free_port(wanted: int) -> int:
    """The port ``wanted`` if it is free, or else a free port that the kernel chooses."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise SystemExit("no port is free on 127.0.0.1; end some programs and try again")


def say(text: str) -> None:
    print(f"\033[1m→ {text}\033[0m" if sys.stdout.isatty() else f"→ {text}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
