"""``python -m service``: gunicorn, and beside it the puller, as one thing to start and to stop.

In containers the two are containers of their own, and this module is not used.
"""

import contextlib
import errno
import importlib.util
import logging
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from registry.errors import UsageError
from service.settings import Settings

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 30.0


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
    configuration = Path(__file__).with_name("gunicorn.conf.py")
    with contextlib.ExitStack() as stack:
        gunicorn = subprocess.Popen([sys.executable, "-m", "gunicorn", "-c", str(configuration)])
        stack.callback(_end, gunicorn, settings.drain_s + 5)

        def forward(number: int, frame: FrameType | None) -> None:
            gunicorn.send_signal(signal.SIGTERM)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, forward)
        if not pull:
            return gunicorn.wait()
        puller: subprocess.Popen[bytes] | None = None

        def end_puller() -> None:
            if puller is not None:
                _end(puller, 5)

        stack.callback(end_puller)
        pause_s, start_at = 1.0, 0.0
        while gunicorn.poll() is None:
            if puller is not None and puller.poll() is not None:
                log.warning("the puller ended with %s; again in %.0f s", puller.returncode, pause_s)
                puller, start_at = None, time.monotonic() + pause_s
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if puller is None and time.monotonic() >= start_at:
                puller = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "registry",
                        "pull",
                        "--watch",
                        *map(str, settings.models),
                    ]
                )
            with contextlib.suppress(subprocess.TimeoutExpired):
                gunicorn.wait(timeout=0.5)
        return gunicorn.returncode


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
