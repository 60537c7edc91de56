"""``convoy serve``: starts and stops gunicorn together with the processes that it needs.

These are the puller; if there may be a GPU, the process that owns it
(``service.loading.gpu_process``); with traces, the process that makes the spans
(``service.observability.tracing.process``); and while a challenger is a shadow, the process that
scores for it (``service.shadow.process``). The supervisor starts each of them again when it ends.
In containers the puller has its own container.
"""

import contextlib
import errno
import importlib.util
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any

from msgspec.structs import replace

from registry.core.devices import may_use_gpu
from registry.core.errors import UsageError
from registry.core.process_lifetime import end_with_parent
from registry.core.service_address import SERVICE_KEY
from registry.delivery.deployment import read_deployment_or_none
from service.settings import (
    GPU_SOCKET,
    MAX_PARENT_BYTES,
    METRICS,
    RUN_FOLDER,
    Settings,
    run_parent,
)

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
CALM_S = 60.0
POLL_INTERVAL_S = 0.5
START_S = 120.0
GUNICORN = [
    sys.executable,
    "-m",
    "gunicorn",
    "-c",
    str(Path(__file__).with_name("gunicorn.conf.py")),
]
PULLER = [sys.executable, "-m", "registry", "pull", "--watch"]
GPU = [sys.executable, "-m", "service.loading.gpu_process"]
SPANS = [sys.executable, "-m", "service.observability.tracing.process"]
SHADOW = [sys.executable, "-m", "service.shadow.process"]


class SupervisedProcess:
    """A process that is started again when it ends, after a pause that grows each time.

    It sees the end of its standard input when ``end`` is called, or when this process dies.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """``environment``: by default that of this process."""
        self._name = name
        self._command = list(command)
        self._environment = environment
        self._pause_s = FIRST_PAUSE_S
        self._start_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def poll_once(self) -> None:
        """Start the process if it is not running and its pause is over."""
        now = time.monotonic()
        if self._process is None:
            if now >= self._start_at:
                self._started = now
                try:
                    self._process = _start(
                        self._command, stdin=subprocess.PIPE, env=self._environment
                    )
                except OSError as error:  # no memory for it, say: the other processes go on
                    log.warning("cannot start %s: %s", self._name, error)
                    self._wait()
        elif (status := self._process.poll()) is not None:
            if now - self._started >= CALM_S:
                self._pause_s = FIRST_PAUSE_S
            log.warning(
                "%s ended with status %s; starting it again in %.0f s",
                self._name,
                status,
                self._pause_s,
            )
            self.end()
            self._wait()

    def _wait(self) -> None:
        """Delay the next start, and double the pause for the one after that."""
        self._start_at = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def wait_for(self, path: Path) -> int | None:
        """None once the process has made ``path``; its exit status if it ends first.

        Raises:
            UsageError: the process did neither within ``START_S``.
        """
        assert self._process is not None
        deadline = time.monotonic() + START_S
        while not path.exists():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(timeout=0.05)
            if time.monotonic() > deadline:
                raise UsageError(
                    f"{self._name} has not chosen a device within {START_S:g} s; "
                    "set CONVOY_DEVICE=cpu to serve without a GPU"
                )
        return None

    def end(self) -> None:
        """End the process: SIGTERM, and SIGKILL after 5 s. Does nothing if none runs."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            _end(self._process, 5)
            self._process = None


def serve(settings: Settings, pull: bool = True) -> int:
    """Serve until SIGTERM or Ctrl-C; returns gunicorn's exit status.

    Args:
        settings: where to listen and what to serve.
        pull: whether to follow the registry; if not, workers serve the versions on disk.

    Raises:
        UsageError: the port cannot be used, or the process that owns the GPU hangs.
    """
    _check_ports(settings)
    if pull and importlib.util.find_spec("mlflow") is None:
        log.warning("MLflow is not installed: serving the versions in %s", settings.models_folder)
        pull = False
    companions: list[SupervisedProcess] = []
    ending = Event()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(_run_folder()))
        (folder / METRICS).mkdir()
        settings = replace(settings, run_folder=folder)
        environment = {
            **os.environ,
            RUN_FOLDER: str(folder),
            "PROMETHEUS_MULTIPROC_DIR": str(folder / METRICS),
            SERVICE_KEY: os.environ.get(SERVICE_KEY) or secrets.token_urlsafe(32),
            "CONVOY_SERVICE_URL": os.environ.get("CONVOY_SERVICE_URL") or settings.address,
        }

        def accompany(name: str, command: Sequence[str]) -> SupervisedProcess:
            companions.append(SupervisedProcess(name, command, environment))
            stack.callback(companions[-1].end)
            companions[-1].poll_once()
            return companions[-1]

        _on_end_signals(lambda number, frame: sys.exit(0))
        if may_use_gpu(settings.device):
            address = folder / "gpu"
            owner = accompany("the GPU's process", [*GPU, str(address)])
            if (status := owner.wait_for(address)) is not None:
                return status  # the process has printed the reason
            environment[GPU_SOCKET] = str(address)
        if settings.tracing:
            # It ends after gunicorn, so that it can send the spans of the last requests.
            accompany("the spans' process", [*SPANS, str(settings.spans_socket)])
        gunicorn = _start(GUNICORN, env=environment)
        stack.callback(_end, gunicorn, settings.graceful_timeout_s + 5)

        def end(number: int, frame: FrameType | None) -> None:
            ending.set()
            gunicorn.send_signal(signal.SIGTERM)

        _on_end_signals(end)
        if pull:
            accompany("the puller", [*PULLER, *map(str, settings.models)])
        shadow = SupervisedProcess("the shadow's process", SHADOW, environment)
        stack.callback(shadow.end)
        while gunicorn.poll() is None:
            if not ending.is_set():
                for companion in companions:
                    companion.poll_once()
                if _has_shadow(settings):
                    shadow.poll_once()
                else:
                    shadow.end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                gunicorn.wait(timeout=POLL_INTERVAL_S)
        return gunicorn.returncode


def _run_folder() -> "tempfile.TemporaryDirectory[str]":
    """A new run folder, which is removed at the end; only this user may enter it."""
    try:
        return tempfile.TemporaryDirectory(prefix="convoy-run-", dir=run_parent())
    except OSError as error:
        raise UsageError(
            f"cannot make a temporary folder ({error}); set TMPDIR to a writable folder "
            f"whose path has at most {MAX_PARENT_BYTES} bytes"
        ) from error


def _has_shadow(settings: Settings) -> bool:
    """Whether a challenger of one of the models is a shadow."""
    deployments = (read_deployment_or_none(settings.models_folder, ref) for ref in settings.models)
    return any(
        deployment and deployment.canary and deployment.canary.shadow for deployment in deployments
    )


def _start(command: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
    """Start a process to which the kernel sends SIGTERM if this one dies."""
    return subprocess.Popen(command, preexec_fn=end_with_parent, **options)


def _on_end_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _check_ports(settings: Settings) -> None:
    """Raise ``UsageError`` if a port cannot be used, or gRPC's packages are missing."""
    _check_port(settings, settings.port, "CONVOY_PORT")
    if settings.grpc_port is not None:
        if importlib.util.find_spec("grpc_health") is None:
            raise UsageError("CONVOY_GRPC_PORT needs more packages: pip install 'convoy[grpc]'")
        if (settings.grpc_certificate is None) != (settings.grpc_key is None):
            raise UsageError("set CONVOY_GRPC_CERTIFICATE and CONVOY_GRPC_KEY both, or neither")
        _check_port(settings, settings.grpc_port, "CONVOY_GRPC_PORT")


def _check_port(settings: Settings, port: int, variable: str) -> None:
    """Raise ``UsageError`` if the port cannot be used; gunicorn would retry five times first."""
    with socket.socket(settings.family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, port))
        except OSError as error:
            taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
            advice = f"choose another with {variable}" if taken else "is CONVOY_HOST right?"
            raise UsageError(
                f"cannot listen on {settings.host} port {port} ({error.strerror}); {advice}"
            ) from error


def _end(process: "subprocess.Popen[bytes]", timeout_s: float) -> None:
    """Send SIGTERM to ``process``, and SIGKILL if it has not ended after ``timeout_s``."""
    process.terminate()
    try:
        process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
