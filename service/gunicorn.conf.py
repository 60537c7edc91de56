"""gunicorn's configuration, made from the app's settings. ``gunicorn -c`` reads this file."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from registry.core.problem_details import Problem
from service.memory import share_heap
from service.observability.logging import logging_config
from service.running_time import RunningTime
from service.server.protocol import Companion, ServerOptions
from service.settings import HANDOVER, METRICS, RUN_FOLDER, Settings, run_parent

settings = Settings.from_environment()
# A worker that ends waits at most this long for its last spans and lines. It keeps the rest of its
# graceful time-out to exit.
RECORDS_TIMEOUT_S = 2.0
EXIT_S = 0.5

wsgi_app = "service:create_app()"
# Each worker binds a socket of its own once it has loaded (service.server.gunicorn_worker), and the
# kernel spreads connections over them. With one shared socket, the worker that woke first took all.
bind: list[str] = []
worker_class = "service.server.gunicorn_worker.LoopWorker"
workers = settings.workers
threads = settings.threads
# Each worker loads its own models: neither CUDA nor OpenMP's threads survive a fork.
preload_app = False
keepalive = 75
graceful_timeout = settings.graceful_timeout_s
timeout = 60
# Nothing uses the control socket, and two services of one user would share its default path.
control_socket_disable = True
# gunicorn lets loopback peers rewrite the path with such headers; a proxy may forward a client's.
forwarder_headers = ""
logconfig_dict = logging_config(settings.log_level)

if settings.tracing and settings.run_folder is None:
    os.environ["OTEL_SDK_DISABLED"] = "true"  # the process that makes the spans does not run
# A new folder for each run: metrics that an earlier run left behind would be counted again.
run_folder = settings.run_folder or Path(tempfile.mkdtemp(prefix="convoy-run-", dir=run_parent()))
os.environ[RUN_FOLDER] = str(run_folder)
# prometheus_client reads it when it is first imported, so it is set before any import of that.
os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(run_folder / METRICS)
(run_folder / METRICS).mkdir(exist_ok=True)
# OpenMP reads it once, when torch is loaded. Its default, all cores, collapses under load.
os.environ["OMP_NUM_THREADS"] = str(settings.forward_threads)


def on_starting(server: Any) -> None:
    """Log if traces cannot be made, and have the arbiter kill no worker soon after a stop.

    `docker pause` stops the arbiter and its workers together. Afterwards the workers' heartbeats
    are old, although the workers are well. So the arbiter then waits one full time-out.
    """
    if settings.tracing and settings.run_folder is None:
        server.log.warning("no traces: only `convoy serve` starts the process that makes spans")
    murder_workers, running_time = server.murder_workers, RunningTime(interval_s=1.0)

    def spare_after_a_stop() -> None:
        if running_time.elapsed_s() > server.cfg.timeout:
            murder_workers()

    server.murder_workers = spare_after_a_stop


def post_fork(server: Any, worker: Any) -> None:
    """Give a worker its options, before it has threads."""
    share_heap()
    worker.options = ServerOptions(
        address=(settings.host, settings.port),
        family=settings.family,
        limits=settings.limits,
        describe_error=lambda *facts: msgspec.json.encode(Problem.of(*facts)),
        on_refusal=_log_refusal if settings.access_log == "on" else None,
        shutdown_delay_s=settings.shutdown_delay_s,
        max_connections_per_address=settings.max_connections_per_address,
        handover_folder=run_folder / HANDOVER,
        companion=None if settings.grpc_port is None else _grpc_server,
    )


def _grpc_server(app: Any) -> Companion:
    """The gRPC server of a worker with this application."""
    from service.protocols.grpc_v2.server import GrpcServer

    return GrpcServer(app.extensions["convoy"])


def _log_refusal(app: Any, client: str, status: int, size: int, request_id: str) -> None:
    """Write a line into the access log for a request that the worker answered itself."""
    app.extensions["convoy"].recorder.access_log.refused(client, status, size, request_id)


def worker_exit(server: Any, worker: Any) -> None:
    """After a worker has drained, write the lines and send the spans that still wait."""
    app = getattr(worker, "wsgi", None)  # there is none if the worker could not load it
    if app is not None and (recorder := app.extensions["convoy"].recorder):
        left_s = worker.killed_at - EXIT_S - time.monotonic()
        recorder.close(min(RECORDS_TIMEOUT_S, max(0.0, left_s)))


def child_exit(server: Any, worker: Any) -> None:
    """Keep the counts of a worker that has ended, and remove its other files."""
    from service.observability.metric_files import forget_process
    from service.server.sockets.handover import forget_worker

    try:
        forget_process(run_folder / METRICS, worker.pid)
        forget_worker(run_folder / HANDOVER, worker.pid)
    except Exception:  # in the arbiter, an error would end the service
        server.log.exception("cannot remove the files of worker %d", worker.pid)


def on_exit(server: Any) -> None:
    """Remove the run folder when gunicorn ends, if this file made it."""
    if settings.run_folder is None:
        shutil.rmtree(run_folder, ignore_errors=True)
