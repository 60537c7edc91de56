"""Starts Docker, base images and the stack of docker-compose.yml, for tests and benchmarks.

It uses a running engine and an image registry if they answer. If not, it starts an engine and
builds the base images. At the end it removes both, except for the engine's chains in iptables.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.traffic import Traffic, in_thread, post
from tests.conftest import free_port

ROOT = Path(__file__).parents[2]
BASE_IMAGES = ("python:3.11-slim-bookworm", "postgres:16-bookworm", "haproxy:3.0")
PULL_S, START_S = 60, 240
NEEDED = ("docker", "docker-compose", "dockerd", "mmdebstrap", "iptables")


class CannotRun(Exception):
    """This machine cannot run containers; the text says what is missing."""


def say(text: str) -> None:
    print(f"[containers] {text}", flush=True)


def wait_until(
    condition: Callable[[], bool], limit_s: float = START_S, why: Callable[[], str] = str
) -> float:
    """Wait until ``condition`` holds; returns the seconds that it took.

    Raises:
        AssertionError: it did not hold within ``limit_s``; the text ends with what ``why`` returns.
    """
    started = time.perf_counter()
    while not condition():
        if time.perf_counter() - started > limit_s:
            raise AssertionError(f"did not happen within {limit_s:g} s: {why()[-6000:]}")
        time.sleep(0.2)
    return time.perf_counter() - started


def run(
    *command: str, environment: Mapping[str, str], timeout_s: float = 900
) -> subprocess.CompletedProcess[str]:
    """Run a command; returns its output.

    Raises:
        AssertionError: it failed; the text contains the end of its output.
    """
    ended = subprocess.run(
        command, env=dict(environment), cwd=ROOT, text=True, capture_output=True, timeout=timeout_s
    )
    output = (ended.stdout + ended.stderr)[-3000:]
    assert ended.returncode == 0, f"{' '.join(command)} ended with {ended.returncode}:\n{output}"
    return ended


@contextlib.contextmanager
def engine() -> Iterator[dict[str, str]]:
    """The environment in which ``docker`` finds an engine.

    Raises:
        CannotRun: no engine answers, and this machine cannot start one.
    """
    environment = {**os.environ, "DOCKER_BUILDKIT": "0", "COMPOSE_DOCKER_CLI_BUILD": "0"}
    if shutil.which("docker") and _answers(environment):
        yield environment
        return
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        raise CannotRun(f"no engine answers; to start one, install {', '.join(missing)}")
    if os.geteuid() != 0:
        raise CannotRun("no engine answers, and only root can start one")
    folder = Path(tempfile.mkdtemp(prefix="convoy-engine-"))
    socket = f"unix://{folder}/docker.sock"
    environment["DOCKER_HOST"] = socket
    say(f"starting an engine in {folder}")
    before = _interfaces()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["dockerd", "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec",
             "--pidfile", f"{folder}/pid", "-H", socket],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        with contextlib.suppress(AssertionError):
            wait_until(lambda: process.poll() is not None or _answers(environment), 30)
        if not _answers(environment):
            output = (folder / "log").read_text()[-1500:]
            raise CannotRun(f"an engine cannot be started here:\n{output}")
        yield environment
    finally:
        process.terminate()
        process.wait(60)
        for left in (folder / "exec" / "netns").glob("*"):  # the engine leaves Swarm's mounts
            subprocess.run(["umount", str(left)], capture_output=True)
        for bridge in _interfaces() - before:
            subprocess.run(["ip", "link", "delete", bridge], capture_output=True)
        shutil.rmtree(folder)


def _interfaces() -> set[str]:
    return {each.name for each in Path("/sys/class/net").iterdir()}


def _answers(environment: Mapping[str, str]) -> bool:
    command = ["docker", "info", "--format", "{{.ServerVersion}}"]
    try:
        ended = subprocess.run(command, env=dict(environment), capture_output=True, timeout=20)
    except subprocess.TimeoutExpired:
        return False
    return ended.returncode == 0 and bool(ended.stdout.strip())


def base_images(environment: Mapping[str, str]) -> None:
    """Pull the base images into the engine, or build them if no image registry answers."""
    for image in BASE_IMAGES:
        if _has(image, environment):
            continue
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            run("docker", "pull", image, environment=environment, timeout_s=PULL_S)
            continue
        say(f"no image registry answers for {image}: building substitutes (two minutes)")
        with tempfile.TemporaryDirectory(prefix="convoy-stand-in-") as work:
            run("deploy/stand-in-images.sh", work, environment=environment)
        return


def _has(image: str, environment: Mapping[str, str]) -> bool:
    command = ["docker", "image", "inspect", image]
    return not subprocess.run(command, env=dict(environment), capture_output=True).returncode


@contextlib.contextmanager
def torch_index() -> Iterator[str]:
    """The address of an index with the build of torch that pip finds on this machine."""
    if index := os.environ.get("TORCH_INDEX_URL"):
        yield index
        return
    with tempfile.TemporaryDirectory(prefix="convoy-torch-") as folder:
        wheels = Path(folder, "torch")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        run(*command, "-d", str(wheels), "-c", "constraints.txt", "torch", environment=os.environ)
        port = free_port()
        server = subprocess.Popen(
            [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "-d", folder],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


class Stack:
    """The containers of docker-compose.yml, under a separate project name."""

    def __init__(self, environment: Mapping[str, str], work: Path, **settings: str) -> None:
        self.port, self.grpc_port, self.control_port = free_port(), free_port(), free_port()
        secrets = work / "secrets"
        secrets.mkdir(mode=0o700)
        for name in (
            "database_password",
            "mlflow_password",
            "mlflow_reader_password",
            "mlflow_session_key",
            "service_key",
        ):
            (secrets / name).write_text(os.urandom(24).hex())
        self.environment = {
            **environment,
            "COMPOSE_PROJECT_NAME": f"convoytest{os.getpid()}",
            "COMPOSE": "docker-compose",
            "CONVOY_SECRETS": str(secrets),
            "CONVOY_PORT": str(self.port),
            "CONVOY_GRPC_PORT": str(self.grpc_port),
            "CONVOY_CONTROL_PORT": str(self.control_port),
            "MLFLOW_PORT": str(free_port()),
            "BUILD_NETWORK": "host",
            **settings,
        }
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def project(self) -> str:
        return self.environment["COMPOSE_PROJECT_NAME"]

    def compose(self, *arguments: str, timeout_s: float = 900) -> str:
        command = ("docker-compose", *arguments)
        return run(*command, environment=self.environment, timeout_s=timeout_s).stdout

    def docker(self, *arguments: str) -> str:
        return run("docker", *arguments, environment=self.environment).stdout.strip()

    def build(self, *services: str) -> float:
        """Build the images of ``services``; returns the seconds that it took."""
        started = time.perf_counter()
        with torch_index() as index:
            self.environment["TORCH_INDEX_URL"] = index
            self.compose("build", *services, timeout_s=1500)
        return time.perf_counter() - started

    def up(self, *services: str, replicas: int = 2) -> None:
        self.compose("up", "-d", "--no-build", "--scale", f"service={replicas}", *services)

    def registry(self, *arguments: str) -> str:
        return self.compose("exec", "-T", "control", "python", "-m", "registry", *arguments)

    def train(self, *options: str, model: str = "fashion") -> None:
        """Train for an epoch and register the next version."""
        command = ("--profile", "train", "run", "--rm", "trainer", "python", "-m", "training")
        self.compose(*command, "--model", model, "--set", "epochs=1", *options)

    def picture(self, data: str = "fashion-mnist") -> bytes:
        """The first picture of the test set, read from the trainer's copy of the data."""
        code = (
            "import sys; from registry.core.paths import convoy_paths;"
            "from training.data.sources import load_dataset;"
            f"data = load_dataset({data!r}, convoy_paths().datasets);"
            "sys.stdout.buffer.write(data.test.encode(0))"
        )
        command = ["docker-compose", "--profile", "train", "run", "--rm", "-T", "trainer"]
        ended = subprocess.run(
            [*command, "python", "-c", code], cwd=ROOT, env=self.environment, capture_output=True
        )
        assert ended.stdout.startswith(b"\x89PNG"), ended.stderr[-2000:]
        return ended.stdout

    def replicas(self) -> list[str]:
        """The ids of the service's containers."""
        return self.compose("ps", "-q", "service").split()

    def served_version(self) -> int | None:
        """The version that answers through the proxy, or None while no replica answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5) as answer:
                version: int | None = json.load(answer)["models"][0]["version"]
                return version
        except (OSError, KeyError, IndexError, ValueError, urllib.error.URLError):
            return None

    def wait_for_version(self, version: int, limit_s: float = START_S) -> float:
        """Wait until ``version`` answers; returns the seconds that it took.

        Raises:
            AssertionError: it did not answer; the text contains the containers' last log lines.
        """

        def logs() -> str:
            return self.compose("logs", "--tail=40", "puller", "service", "proxy")

        return wait_until(lambda: self.served_version() == version, limit_s, logs)

    def wait_healthy(self, *services: str, limit_s: float = START_S) -> float:
        """Wait until every container of ``services`` is healthy; returns the seconds."""
        template = "{{.State.Health.Status}} {{.RestartCount}}"

        def healthy() -> bool:
            found = self.docker(
                "inspect", "-f", template, *self.compose("ps", "-q", *services).split()
            )
            states = [line.split() for line in found.splitlines()]
            assert all(int(restarts) <= 2 for _, restarts in states), f"restarts: {logs()}"
            return all(health == "healthy" for health, _ in states)

        def logs() -> str:
            return self.compose("logs", "--tail=40", *services)

        return wait_until(healthy, limit_s, logs)

    def classify(self, picture: bytes) -> dict[str, Any]:
        request = urllib.request.Request(f"{self.url}/v1/classify", data=picture)
        with urllib.request.urlopen(request, timeout=20) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def down(self) -> None:
        self.compose("--profile", "train", "down", "--volumes", "--remove-orphans", "-t", "20")

    def left_behind(self) -> str:
        """The containers, volumes and networks of the project that still exist."""
        label = f"label=com.docker.compose.project={self.project}"
        kinds = (("ps", "-aq"), ("volume", "ls", "-q"), ("network", "ls", "-q"))
        return "".join(self.docker(*kind, "--filter", label) for kind in kinds)


@contextlib.contextmanager
def load(stack: Stack, picture: bytes, rate: float = 40.0) -> Iterator[Counter[int]]:
    """Send requests through the proxy while the block runs; it then has the counts by status."""
    counts: Counter[int] = Counter()
    traffic = Traffic(stack.port, lambda: post(picture), rate)
    try:
        with in_thread(traffic):
            time.sleep(1)
            yield counts
            time.sleep(2)
    finally:
        counts.update(row.status for row in traffic.rows)
        for row in traffic.rows:
            if row.status != 200:
                say(f"{row.due - traffic.began:.1f} s, after {row.done - row.due:.2f} s: {row}")
