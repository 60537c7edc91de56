"""The shadow's process: has a challenger score copies of the images that the champion answered.

The kernel runs it only when no other process wants the core, and it rests when it has used its
share of the machine. So requests notice neither its cost nor its failures. While it is busy or
rests, workers drop their samples.
"""

import contextlib
import logging
import logging.config
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from threading import Thread

import msgspec
import numpy as np
from msgspec import Struct

from registry.core.devices import CORES
from registry.core.errors import DeviceLost
from registry.core.process_lifetime import end_with_standard_input
from registry.delivery.deployment import read_deployment_or_none, version_folder
from registry.delivery.signing import TrustedKeys, check_signature
from registry.model.bundle import open_bundle
from registry.model.classifier import Classifier
from registry.model.image.decode import Pixels, decode_image
from registry.model.manifest import Manifest
from registry.model.refs import CHAMPION, ModelRef
from service.loading.gpu_client import PlanLoader
from service.observability.metrics import Metrics
from service.settings import Settings
from service.shadow.client import BUFFER_BYTES, Sample

log = logging.getLogger(__name__)

BATCH = 8
WAIT_S = 0.5
# How long to wait before loading a challenger again that could not be loaded.
RETRY_S = 10.0
_decode = msgspec.msgpack.Decoder(Sample).decode


class ShadowModel(Struct, frozen=True):
    """A loaded challenger."""

    version: int
    manifest: Manifest
    classifier: Classifier


class Shadow:
    """Scores as many samples as its share of the machine allows."""

    def __init__(self, settings: Settings, planner: PlanLoader, metrics: Metrics) -> None:
        self._settings = settings
        self._trust = TrustedKeys.from_environment()
        self._planner = planner
        self._metrics = metrics
        self._loaded: dict[str, ShadowModel] = {}
        self._retry_at: dict[tuple[str, int], float] = {}

    def serve(self, receiver: socket.socket) -> None:
        """Score samples from ``receiver`` until the process ends."""
        budget = CpuBudget(self._settings.shadow_cpu * CORES)
        while True:
            for model, samples in _by_model(_receive(receiver)).items():
                self.score(model, samples)
            time.sleep(budget.rest_s())

    def score(self, model: str, samples: list[Sample]) -> None:
        """Score ``samples`` of one model and note whether the challenger agrees."""
        loaded = self._challenger(model, samples[-1].challenger)
        if loaded is None:
            return
        mine = [each for each in samples if each.challenger == loaded.version]
        try:
            pixels = np.stack([self._pixels(each, loaded.manifest) for each in mine])
            scores = loaded.classifier.classify(pixels)
        except DeviceLost as error:  # not the challenger's fault; another process takes over
            log.warning("%s version %d: %s", model, loaded.version, error)
            del self._loaded[model]
            return
        except Exception as error:  # noqa: BLE001 - any failure is counted against it
            log.warning("%s version %d failed in the shadow: %s", model, loaded.version, error)
            self._metrics.shadowed(model, loaded.version, "failed", len(mine))
            return
        finite = np.isfinite(scores).all(axis=1)
        same = scores.argmax(axis=1) == [each.index for each in mine]
        for outcome, which in (
            ("failed", ~finite),
            ("agreed", finite & same),
            ("differed", finite & ~same),
        ):
            if count := int(which.sum()):
                self._metrics.shadowed(model, loaded.version, outcome, count)

    def _challenger(self, model: str, version: int) -> ShadowModel | None:
        """The challenger, loaded; None if the deployment has another one or it cannot be loaded."""
        known = self._loaded.get(model)
        if known and known.version == version:
            return known
        if time.monotonic() < self._retry_at.get((model, version), 0.0):
            return None
        champion = ModelRef(model, alias=CHAMPION)
        deployment = read_deployment_or_none(self._settings.models_folder, champion)
        deployed = deployment.challenger if deployment else None
        if deployed is None or deployed.version != version:
            return None
        folder = version_folder(self._settings.models_folder, model, version)
        try:
            bundle = open_bundle(folder, deployed.manifest_sha256)
            if self._trust:
                check_signature(bundle, model, version, self._trust)
            fresh = ShadowModel(version, bundle.manifest, self._planner.load(bundle))
        except Exception as error:  # noqa: BLE001 - an engine may raise anything
            log.warning("cannot load %s version %d as a shadow: %s", model, version, error)
            self._retry_at[model, version] = time.monotonic() + RETRY_S
            return None
        self._loaded[model] = fresh
        return fresh

    def _pixels(self, sample: Sample, manifest: Manifest) -> Pixels:
        if sample.is_encoded:
            limits = self._settings.decode_limits
            return decode_image(sample.image, manifest.preprocess, limits)
        return np.frombuffer(sample.image, np.uint8).reshape(manifest.preprocess.shape)


class CpuBudget:
    """Tells how long to rest so that this process uses at most ``cores`` cores."""

    def __init__(self, cores: float, clock: Callable[[], float] = time.process_time) -> None:
        """``clock`` gives the CPU time that this process has used, in seconds."""
        self._cores = cores
        self._clock = clock
        self._used_s = clock()

    def rest_s(self) -> float:
        """Seconds to rest for the CPU time that was used since the last call."""
        before, self._used_s = self._used_s, self._clock()
        return (self._used_s - before) / self._cores


def _receive(receiver: socket.socket) -> list[Sample]:
    """The samples that have arrived, ``BATCH`` at most; empty if none came within ``WAIT_S``."""
    samples: list[Sample] = []
    receiver.settimeout(WAIT_S)
    with contextlib.suppress(BlockingIOError, TimeoutError):
        while len(samples) < BATCH:
            data = receiver.recv(BUFFER_BYTES)
            receiver.settimeout(0)
            try:
                samples.append(_decode(data))
            except msgspec.MsgspecError as error:
                log.warning("cannot read a sample: %s", error)
    return samples


def _by_model(samples: list[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.model, []).append(sample)
    return found


def _run_when_idle() -> None:
    """Have the kernel run this process only when no other wants the core."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):  # not Linux, or not allowed
        os.nice(19)


def main() -> int:
    """Score until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Thread(target=end_with_standard_input, daemon=True).start()
    from service.loading.open_slots import open_planner
    from service.observability.logging import logging_config

    settings = Settings.from_environment()
    logging.config.dictConfig(logging_config(settings.log_level))
    address = settings.shadow_socket
    assert address is not None, "convoy serve starts this"
    _run_when_idle()
    metrics = Metrics()
    metrics.start()
    with contextlib.suppress(FileNotFoundError):
        address.unlink()  # left by the process before this one
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(address))
        Shadow(settings, open_planner(settings), metrics).serve(receiver)
    return 0


if __name__ == "__main__":
    sys.exit(main())
