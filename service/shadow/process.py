"""Scores in the champion's shadow, in a process beside the workers of a service.

A process of its own, which the kernel runs only when nothing else wants the core, and which rests
when it has used its part of the machine. What the challenger costs, or breaks, no request can
notice; samples that come meanwhile are dropped by those who send them.
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
# A challenger that cannot be loaded is tried again after so long.
RETRY_S = 10.0
_decode = msgspec.msgpack.Decoder(Sample).decode


class ShadowModel(Struct, frozen=True):
    """The challenger of a model."""

    version: int
    manifest: Manifest
    classifier: Classifier


class Shadow:
    """Scores samples, as many as its part of the machine allows."""

    def __init__(self, settings: Settings, planner: PlanLoader, metrics: Metrics) -> None:
        self._settings = settings
        self._trust = TrustedKeys.from_environment()
        self._planner = planner
        self._metrics = metrics
        self._loaded: dict[str, ShadowModel] = {}
        self._retry_at: dict[tuple[str, int], float] = {}

    def serve(self, receiver: socket.socket) -> None:
        """Score what comes, until the process ends."""
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
        except Exception as error:  # noqa: BLE001 - whatever it does, it is counted against it
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
        """The challenger of that version; None while the release does not name it, or it fails."""
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
            log.warning("%s version %d cannot be scored: %s", model, version, error)
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
    """How long to rest so that this process takes no more than so many cores."""

    def __init__(self, cores: float, clock: Callable[[], float] = time.process_time) -> None:
        self._cores = cores
        self._clock = clock
        self._used_s = clock()

    def rest_s(self) -> float:
        """Seconds that what was used since the last call takes to be earned."""
        before, self._used_s = self._used_s, self._clock()
        return (self._used_s - before) / self._cores


def _receive(receiver: socket.socket) -> list[Sample]:
    """The samples that are there, at least one unless none comes for a while."""
    samples: list[Sample] = []
    receiver.settimeout(WAIT_S)
    with contextlib.suppress(BlockingIOError, TimeoutError):
        while len(samples) < BATCH:
            data = receiver.recv(BUFFER_BYTES)
            receiver.settimeout(0)
            try:
                samples.append(_decode(data))
            except msgspec.MsgspecError as error:
                log.warning("a sample cannot be read: %s", error)
    return samples


def _by_model(samples: list[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.model, []).append(sample)
    return found


def _yield_to_all() -> None:
    """Run only when nothing else wants the core."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):  # not Linux, or not allowed
        os.nice(19)


def main() -> int:
    """Score until standard input ends; 2 when that is impossible."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Thread(target=end_with_standard_input, daemon=True).start()
    from service.loading.open_slots import open_planner
    from service.observability.logging import logging_config

    settings = Settings.from_environment()
    logging.config.dictConfig(logging_config(settings.log_level))
    address = settings.shadow_socket
    assert address is not None, "python -m service starts this"
    _yield_to_all()
    metrics = Metrics()
    metrics.start()
    with contextlib.suppress(FileNotFoundError):
        address.unlink()  # left by a process that this one takes over from
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(address))
        Shadow(settings, open_planner(settings), metrics).serve(receiver)
    return 0


if __name__ == "__main__":
    sys.exit(main())
