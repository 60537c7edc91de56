"""``python -m service``: gunicorn, and beside it what it needs, as one thing to start and to stop.

That is the puller, and where there may be a GPU, the process that owns it (``service.gpu``). Either
is started again when it ends. In containers the puller is a container of its own.
"""

import contextlib
import errno
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from registry.devices import may_use_gpu
from registry.errors import UsageError
from service.settings import GPU_SOCKET, Settings

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
CALM_S = 60.0
LOOK_S = 0.5
GUNICORN = [
    sys.executable,
    "-m",
    "gunicorn",
    "-c",
    str(Path(__file__).with_name("gunicorn.conf.py")),
]
PULLER = [sys.executable, "-m", "registry", "pull", "--watch"]
GPU = [sys.executable, "-m", "service.gpu"]


class Companion:
    """A process that is started again when it ends, after a pause that grows with each time."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self._name = name
        self._command = list(command)
        self._pause_s = FIRST_PAUSE_S
        self._start_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def look(self) -> None:
        """Start the process again if it has ended and its pause is over."""
        now = time.monotonic()
        if self._process is None:
            if now >= self._start_at:
                self._start()
        elif (status := self._process.poll()) is not None:
            if now - self._started >= CALM_S:
                self._pause_s = FIRST_PAUSE_S
            log.warning("%s ended with %s; again in %.0f s", self._name, status, self._pause_s)
            self._process, self._start_at = None, now + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def wait_for(self, path: Path) -> int | None:
        """Wait until the process makes ``path``; its exit status if it ends instead."""
        assert self._process is not None
        while not path.exists():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(timeout=0.05)
        return None

    def end(self) -> None:
        if self._process is not None:
            _end(self._process, 5)

    def _start(self) -> None:
        self._started = time.monotonic()
        self._process = subprocess.Popen(self._command)


def serve(settings: Settings, pull: bool = True) -> int:
    """Serve until SIGTERM or Ctrl-C; returns gunicorn's exit status.

    Args:
        settings: where to listen and what to serve.
        pull: follow the registry; without it, what lies on disk serves.

    Raises:
        UsageError: the port is taken.
    """
    _check_port(settings)
    if pull and importlib.util.find_spec("mlflow") is None:
        log.warning("MLflow is not installed: serving what lies in %s", settings.models_folder)
        pull = False
    companions: list[Companion] = []
    environment = dict(os.environ)
    with contextlib.ExitStack() as stack:
        _on_end_signals(lambda number, frame: sys.exit(0))
        if may_use_gpu(settings.device):
            # Only this user may enter a temporary folder.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="convoy-gpu-"))
            address = Path(folder) / "socket"
            companions.append(Companion("the GPU's process", [*GPU, str(address)]))
            stack.callback(companions[-1].end)
            if (status := companions[-1].wait_for(address)) is not None:
                return status  # it has said why
            environment[GPU_SOCKET] = str(address)
        gunicorn = subprocess.Popen(GUNICORN, env=environment)
        stack.callback(_end, gunicorn, settings.drain_s + 5)
        _on_end_signals(lambda number, frame: gunicorn.send_signal(signal.SIGTERM))
        if pull:
            companions.append(Companion("the puller", [*PULLER, *map(str, settings.models)]))
            stack.callback(companions[-1].end)
        while gunicorn.poll() is None:
            for companion in companions:
                companion.look()
            with contextlib.suppress(subprocess.TimeoutExpired):
                gunicorn.wait(timeout=LOOK_S)
        return gunicorn.returncode


def _on_end_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _check_port(settings: Settings) -> None:
    """Say who is to blame for a taken port before gunicorn retries five times."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
            advice = "choose another with CONVOY_PORT" if taken else "is CONVOY_HOST right?"
            raise UsageError(
                f"cannot listen on {settings.host} port {settings.port} "
                f"({error.strerror}); {advice}"
            ) from error


def _end(process: "subprocess.Popen[bytes]", patience_s: float) -> None:
    """Ask ``process`` to end, and make it if it does not."""
    process.terminate()
    try:
        process.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
