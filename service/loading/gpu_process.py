"""The process that owns the GPU, and runs the plans of all workers on it.

A GPU works best with one process. A context in every worker would cost each a second and hundreds
of megabytes, and the device is fastest when the images of all workers share a batch. So workers
decode, and send pixels over a Unix socket to this process, which loads, checks and runs plans.
A CPU works best with the opposite (docs/decisions/0009): if the device turns out to be a CPU, this
process answers so, and the workers run their plans themselves.

A connection serves one version to one worker, which names it at the start and frees it by closing
the connection. When the device fails, this process ends. That breaks every connection, and no
worker is ready until the process that is started next has chosen a device.
"""

import logging
import logging.config
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from threading import Lock, Thread
from typing import NoReturn
from weakref import WeakValueDictionary

import msgspec
import numpy as np

from registry.core.errors import ConvoyError, DeviceLost
from registry.core.process_lifetime import end_with_standard_input
from registry.model.bundle import Bundle, open_bundle
from registry.model.classifier import Classifier
from registry.model.image.decode import Pixels
from service.inference.batcher import BatchLimits, MicroBatcher, Prediction
from service.loading.gpu_client import (
    ANSWER_S,
    FAILURE,
    LOAD_S,
    SCORES,
    LoadRequest,
    LoadResponse,
    PlanLoader,
    as_remote_error,
)
from service.running_time import RunningTime
from service.settings import Settings

log = logging.getLogger(__name__)

PASS_S = 20.0  # a forward pass that takes longer is taken to hang
DEVICE_LOST = 70  # exit status
_encode = msgspec.json.encode


class GpuModel:
    """A version on the GPU. Each connection that serves it holds a reference; the last frees it."""

    def __init__(self, classifier: Classifier, max_batch: int, max_batch_compute_ms: float) -> None:
        self.device = classifier.device
        self.plan = classifier.plan
        # No limits: each connection has one batch at a time, and its worker limits its own queue.
        self.batcher = MicroBatcher(
            lambda pixels: classifier.predict(pixels).rows(),
            BatchLimits(
                max_batch=max_batch,
                queue_limit=sys.maxsize,
                max_batch_compute_ms=max_batch_compute_ms,
                max_queue_delay_s=math.inf,
            ),
        )


class GpuServer:
    """Answers all workers, with a thread for each connection. Their images share batches."""

    def __init__(self, planner: PlanLoader, device: str, settings: Settings) -> None:
        self._planner = planner
        self._device = device
        self._settings = settings
        self._loaded: WeakValueDictionary[str, GpuModel] = WeakValueDictionary()
        self._loading = Lock()
        self._loading_since: float | None = None
        self._running_time = RunningTime(PASS_S / 10)

    def serve(self, listener: Listener) -> None:
        """Accept connections until ``listener`` fails."""
        Thread(target=self._watch, daemon=True).start()
        while True:
            Thread(target=self._handle, args=(listener.accept(),), daemon=True).start()

    def _watch(self) -> NoReturn:
        """End the process when a forward pass or a load hangs, as nothing else can stop those."""
        while True:
            time.sleep(PASS_S / 10)
            self._end_if_hung()

    def _end_if_hung(self) -> None:
        """End the process if a forward pass or a load hangs.

        This is not a part of ``_watch``, whose variables would keep a version alive while it
        sleeps.
        """
        ran_s = self._running_time.elapsed_s()
        since = self._loading_since
        if since is not None and min(time.monotonic() - since, ran_s) > LOAD_S:
            _end_lost(f"a version has not been loaded within {LOAD_S:g} s")
        # ``valuerefs`` is a copy: other threads add versions to the dictionary.
        for held in self._loaded.valuerefs():
            loaded = held()
            if loaded is not None and min(loaded.batcher.running_s, ran_s) > PASS_S:
                _end_lost(f"a forward pass has not ended within {PASS_S:g} s")

    def _handle(self, connection: Connection) -> None:
        try:
            with connection:
                wanted = msgspec.json.decode(connection.recv_bytes(), type=LoadRequest)
                self._serve(connection, wanted)
        except (EOFError, OSError):
            return  # the worker ended, or freed the version
        except DeviceLost as error:
            _end_lost(str(error))
        except Exception:  # the edge of a thread
            log.exception("a worker's connection failed")

    def _serve(self, connection: Connection, wanted: LoadRequest) -> None:
        reply, loaded, bundle = LoadResponse(self._device), None, None
        try:
            if self._device != "cpu":
                bundle = open_bundle(Path(wanted.folder), wanted.manifest_sha256)
                if wanted.step == "choose":
                    self._planner.choose(bundle)
                else:
                    loaded = self._hold(bundle)
                    reply = LoadResponse(self._device, loaded.device, loaded.plan)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001 - the edge of a connection: the worker gets it
            log.warning("cannot %s %s: %s", wanted.step, wanted.folder, error)
            reply = LoadResponse(self._device, failure=as_remote_error(error))
        connection.send_bytes(_encode(reply))
        while loaded and bundle:
            shape = bundle.manifest.preprocess.shape
            pixels = np.frombuffer(connection.recv_bytes(), np.uint8).reshape(-1, *shape)
            connection.send_bytes(_answer(loaded, pixels))

    def _hold(self, bundle: Bundle) -> GpuModel:
        """The version of ``bundle``, loaded on the first worker's request."""
        with self._loading:
            loaded = self._loaded.get(bundle.manifest_sha256)
            if loaded is None:
                self._loading_since = time.monotonic()
                try:
                    classifier = self._planner.load(bundle)
                finally:
                    self._loading_since = None
                loaded = GpuModel(
                    classifier, self._settings.max_batch, self._settings.max_batch_compute_ms
                )
                self._loaded[bundle.manifest_sha256] = loaded
            return loaded


def _answer(loaded: GpuModel, pixels: Pixels) -> bytes:
    queued_images = loaded.batcher.put(list(pixels), ANSWER_S)
    outcomes = [loaded.batcher.wait(queued_image) for queued_image in queued_images]
    scored = [each.row for each in outcomes if isinstance(each, Prediction)]
    if len(scored) == len(pixels):
        return SCORES + np.stack(scored).tobytes()
    # The worker sends each image again, alone, so that a bad image does not fail the others.
    error = next(each for each in outcomes if isinstance(each, Exception))
    if isinstance(error, DeviceLost):
        raise error
    return FAILURE + _encode(as_remote_error(error))


def _end_lost(reason: str) -> NoReturn:
    log.error("the GPU was lost: %s; another process takes over", reason)
    os._exit(DEVICE_LOST)  # an orderly exit may hang on the broken device


def main(argv: Sequence[str] | None = None) -> int:
    """Own the device; returns 2 if a device that an operator named does not work.

    The process ends when its standard input does. It ignores SIGINT and SIGTERM, which reach all
    processes of a service: workers that drain still need the device.
    """
    (address,) = sys.argv[1:] if argv is None else argv
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Thread(target=end_with_standard_input, daemon=True).start()
    from registry.core.devices import choose_device
    from registry.model.plans.planner import Planner
    from service.observability.logging import logging_config

    settings = Settings.from_environment()
    logging.config.dictConfig(logging_config(settings.log_level))
    try:
        device = choose_device(settings.device)
        planner = Planner(settings.plans_folder, device, None, settings.plan)
    except ConvoyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Path(address).unlink(missing_ok=True)  # left by the process before this one
    with Listener(address, "AF_UNIX", backlog=128) as listener:
        GpuServer(planner, device, settings).serve(listener)
    return 0


if __name__ == "__main__":
    sys.exit(main())
