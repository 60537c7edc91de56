"""The process that owns the GPU, ``python -m service.gpu SOCKET``, and the workers' way to it.

A GPU wants one process: a context in every worker would cost each a second and hundreds of
megabytes, and the device does best with what all workers have to ask, in one batch. So workers
decode, and send pixels over a Unix socket to the one process that loads, proves and runs plans.
A CPU wants the opposite (docs/decisions/0009): when the device turns out to be one, this process
says so, and the workers run their plans themselves.

A connection is one version for one worker: asked for when it opens, let go when it closes. When the
device fails, the process ends, so every connection breaks and every worker is unready until the
process that takes its place has chosen a device afresh.
"""

import logging
import logging.config
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from threading import Lock, Thread
from typing import Literal, Protocol

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from registry import errors as domain
from registry.bundle import Bundle, open_bundle
from registry.classifier import Classifier
from registry.errors import ConvoyError, DeviceLost
from registry.plans.plan import Run
from registry.preprocess import Pixels
from service.batcher import MicroBatcher, Scored
from service.settings import Settings

log = logging.getLogger(__name__)

LOAD_S = 50.0  # a worker that has not started after 60 s is killed
ANSWER_S = 30.0
DEVICE_LOST = 70  # exit status
_SCORES, _FAILURE = b"\0", b"\1"
_encode = msgspec.json.encode


class Planning(Protocol):
    """Chooses and loads plans: ``registry.plans.choice.Planner`` does, and ``GpuPlanner``."""

    def load(self, bundle: Bundle) -> Classifier:
        """The classifier of ``bundle``; raises ``PlanUndecided`` when none was chosen yet."""

    def choose(self, bundle: Bundle) -> object:
        """Choose the plan of ``bundle``, however long it takes."""


class Wanted(Struct, frozen=True):
    """The first message of a connection: what a worker wants done with a bundle."""

    step: Literal["load", "choose"]
    folder: str
    manifest_sha256: str


class Failure(Struct, frozen=True):
    """An error on its way to a worker: its class, by name, and its text."""

    error: str
    text: str


class Reply(Struct, frozen=True):
    """The answer to ``Wanted``. Of device ``cpu`` nothing was done: the worker does it itself."""

    device: str
    shown_device: str = ""
    plan: str = ""
    failure: Failure | None = None


class GpuPlanner:
    """What a ``Planner`` is to a worker, by the process that owns the GPU."""

    def __init__(self, address: Path, on_cpu: Planning) -> None:
        """``on_cpu`` plans where that process found no GPU to use."""
        self._address = address
        self._on_cpu = on_cpu

    def load(self, bundle: Bundle) -> Classifier:
        """The classifier of ``bundle``, which runs over there.

        Raises:
            DeviceLost: the process does not answer; one that does is on its way.
            PlanUndecided, BundleInvalid: as ``Planner.load``.
        """
        connection, reply = self._ask("load", bundle, LOAD_S)
        if reply.device == "cpu":
            connection.close()
            return self._on_cpu.load(bundle)
        run = _remote_run(connection, len(bundle.manifest.labels))
        # Nothing is sent unasked: what can be read between two answers is the end.
        return Classifier(run, reply.plan, reply.shown_device, is_lost=connection.poll)

    def choose(self, bundle: Bundle) -> None:
        """Have the plan of ``bundle`` chosen, which may take minutes.

        Raises:
            DeviceLost, BundleInvalid: as ``load``.
        """
        connection, reply = self._ask("choose", bundle, None)
        connection.close()
        if reply.device == "cpu":
            self._on_cpu.choose(bundle)

    def _ask(
        self, step: Literal["load", "choose"], bundle: Bundle, patience_s: float | None
    ) -> tuple[Connection, Reply]:
        wanted = Wanted(step, str(bundle.folder.resolve()), bundle.manifest_sha256)
        try:
            connection = Client(str(self._address), "AF_UNIX")
            connection.send_bytes(_encode(wanted))
            if not connection.poll(patience_s):
                raise DeviceLost(f"the GPU's process did not {step} a plan in {patience_s:g} s")
            reply = msgspec.json.decode(connection.recv_bytes(), type=Reply)
        except (OSError, EOFError) as error:
            raise DeviceLost("the process that owns the GPU is not running") from error
        if reply.failure:
            connection.close()
            raise _as_error(reply.failure)
        return connection, reply


def _remote_run(connection: Connection, classes: int) -> Run:
    """A forward pass at the other end of ``connection``."""

    def run(pixels: Pixels) -> NDArray[np.float32]:
        try:
            connection.send_bytes(np.ascontiguousarray(pixels).reshape(-1).data)
            if not connection.poll(ANSWER_S):
                raise DeviceLost(f"the GPU's process did not answer in {ANSWER_S:g} s")
            answer = connection.recv_bytes()
        except (OSError, EOFError) as error:
            raise DeviceLost("the process that owns the GPU has ended") from error
        if answer[:1] == _FAILURE:
            raise _as_error(msgspec.json.decode(answer[1:], type=Failure))
        return np.frombuffer(answer, np.float32, offset=1).reshape(len(pixels), classes)

    return run


def _as_error(failure: Failure) -> Exception:
    kind = getattr(domain, failure.error, None)
    if isinstance(kind, type) and issubclass(kind, ConvoyError):
        return kind(failure.text)
    return RuntimeError(f"{failure.error}: {failure.text}")


def _as_failure(error: Exception) -> Failure:
    return Failure(type(error).__name__, str(error))


class Loaded:
    """A version on the GPU, and how many connections hold it."""

    def __init__(self, classifier: Classifier, settings: Settings) -> None:
        self.classifier = classifier
        self.holders = 0
        self.batcher = MicroBatcher(
            classifier.classify, settings.max_batch, settings.queue_limit, settings.batch_ms
        )


class GpuServer:
    """Answers the connections of all workers, a thread each; their images share batches."""

    def __init__(self, planner: Planning, device: str, settings: Settings) -> None:
        self._planner = planner
        self._device = device
        self._settings = settings
        self._loaded: dict[str, Loaded] = {}
        self._loading = Lock()

    def serve(self, listener: Listener) -> None:
        """Take connections until ``listener`` is closed."""
        while True:
            try:
                connection = listener.accept()
            except OSError:
                return
            Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection: Connection) -> None:
        try:
            with connection:
                wanted = msgspec.json.decode(connection.recv_bytes(), type=Wanted)
                self._serve(connection, wanted)
        except (EOFError, OSError):
            return  # the worker ended, or let go of the version
        except DeviceLost as error:
            log.error("the GPU was lost: %s; another process takes over", error)
            os._exit(DEVICE_LOST)  # at once: what is left of the device may hang an orderly end
        except Exception:  # the edge of a thread
            log.exception("a worker's connection ended")

    def _serve(self, connection: Connection, wanted: Wanted) -> None:
        device = self._device
        if device == "cpu":
            connection.send_bytes(_encode(Reply(device)))
            return
        try:
            bundle = open_bundle(Path(wanted.folder), wanted.manifest_sha256)
            if wanted.step == "choose":
                self._planner.choose(bundle)
                connection.send_bytes(_encode(Reply(device)))
                return
            loaded = self._hold(bundle)
        except (DeviceLost, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - the edge of a connection: the worker is told
            connection.send_bytes(_encode(Reply(device, failure=_as_failure(error))))
            return
        try:
            classifier = loaded.classifier
            connection.send_bytes(_encode(Reply(device, classifier.device, classifier.plan)))
            shape = bundle.manifest.preprocess.shape
            while True:
                pixels = np.frombuffer(connection.recv_bytes(), np.uint8).reshape(-1, *shape)
                connection.send_bytes(self._answer(loaded, pixels))
        finally:
            self._let_go(wanted.manifest_sha256, loaded)

    def _hold(self, bundle: Bundle) -> Loaded:
        """The version of ``bundle``, loaded by whichever worker asks first."""
        with self._loading:
            loaded = self._loaded.get(bundle.manifest_sha256)
            if loaded is None:
                loaded = Loaded(self._planner.load(bundle), self._settings)
                self._loaded[bundle.manifest_sha256] = loaded
            loaded.holders += 1
            return loaded

    def _let_go(self, manifest_sha256: str, loaded: Loaded) -> None:
        with self._loading:
            loaded.holders -= 1
            if not loaded.holders:
                del self._loaded[manifest_sha256]

    def _answer(self, loaded: Loaded, pixels: Pixels) -> bytes:
        try:
            tickets = loaded.batcher.put(list(pixels), self._settings.deadline_s)
            outcomes = [loaded.batcher.wait(ticket) for ticket in tickets]
        except ConvoyError as error:
            outcomes = [error]
        for outcome in outcomes:
            if isinstance(outcome, DeviceLost):
                raise outcome
        scored = [each.probabilities for each in outcomes if isinstance(each, Scored)]
        if len(scored) == len(pixels):
            return _SCORES + np.stack(scored).tobytes()
        first = next(each for each in outcomes if isinstance(each, Exception))
        return _FAILURE + _encode(_as_failure(first))


def main(argv: Sequence[str] | None = None) -> int:
    """Own the device until SIGTERM; 2 when a device that was asked for by name does not work."""
    (address,) = sys.argv[1:] if argv is None else argv
    from registry.devices import choose_device
    from registry.plans.choice import Planner
    from service.logs import logging_config

    settings = Settings.from_environment()
    logging.config.dictConfig(logging_config(settings.log_level))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this, last of all
    try:
        device = choose_device(settings.device)
        planner = Planner(settings.plans_folder, device, None, settings.plan)
    except ConvoyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Path(address).unlink(missing_ok=True)  # left by a process that this one takes over from
    with Listener(address, "AF_UNIX", backlog=128) as listener:
        GpuServer(planner, device, settings).serve(listener)
    return 0


if __name__ == "__main__":
    sys.exit(main())
