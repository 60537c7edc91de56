"""The process that owns the GPU, and the workers' way to it.

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
import math
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from threading import Lock, Thread
from typing import Literal, NoReturn, Protocol
from weakref import WeakValueDictionary

import msgspec
import numpy as np
from msgspec import Struct

from registry.core import errors as domain
from registry.core.errors import ConvoyError, DeviceLost
from registry.core.process_lifetime import end_with_standard_input
from registry.model.bundle import Bundle, open_bundle
from registry.model.classifier import Classifier
from registry.model.image.decode import Pixels
from registry.model.plans.base import Outputs
from service.inference.batcher import MicroBatcher, Scored
from service.running_time import RunningTime
from service.settings import Settings

log = logging.getLogger(__name__)

LOAD_S = 120.0  # graphs of a large network, for every batch size, take tens of seconds
PASS_S = 20.0  # a forward pass that takes longer hangs
ANSWER_S = 30.0  # longer than that: who asks should hear of it by the process's end
DEVICE_LOST = 70  # exit status
_SCORES, _FAILURE = b"\0", b"\1"
_encode = msgspec.json.encode


class Planning(Protocol):
    """Chooses and loads plans: ``Planner`` does, and ``GpuPlanner``."""

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
        remote = RemotePredict(connection, len(bundle.manifest.labels))
        return Classifier(remote, reply.plan, reply.shown_device, is_lost=remote.is_lost)

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
                connection.close()
                raise DeviceLost(f"the GPU's process did not {step} a plan in {patience_s:g} s")
            reply = msgspec.json.decode(connection.recv_bytes(), type=Reply)
        except (OSError, EOFError) as error:
            raise DeviceLost("the process that owns the GPU is not running") from error
        if reply.failure:
            connection.close()
            raise _as_error(reply.failure)
        return connection, reply


class RemotePredict:
    """A forward pass at the other end of a connection: a ``PredictFn``."""

    def __init__(self, connection: Connection, classes: int) -> None:
        self._connection = connection
        self._classes = classes
        # Else a batch larger than the socket's buffer would wait for ever to be read.
        limit = struct.pack("ll", int(ANSWER_S), int(ANSWER_S % 1 * 1e6))
        with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def __call__(self, pixels: Pixels) -> Outputs:
        try:
            self._connection.send_bytes(np.ascontiguousarray(pixels).reshape(-1).data)
            if not self._connection.poll(ANSWER_S):
                self._lose(f"did not answer in {ANSWER_S:g} s")
            answer = self._connection.recv_bytes()
        except (OSError, EOFError) as error:
            self._lose("has ended", error)
        if answer[:1] == _FAILURE:
            raise _as_error(msgspec.json.decode(answer[1:], type=Failure))
        rows = np.frombuffer(answer, np.float32, offset=1).reshape(len(pixels), -1)
        return Outputs.from_rows(rows, self._classes)

    def is_lost(self) -> bool:
        """Between two calls: nothing is sent unasked, so what can be read then is the end."""
        return self._connection.closed or self._connection.poll()

    def _lose(self, what: str, error: Exception | None = None) -> NoReturn:
        """Close the connection: an answer that came too late would pass for the next one's."""
        self._connection.close()
        raise DeviceLost(f"the process that owns the GPU {what}") from error


def _as_error(failure: Failure) -> Exception:
    kind = getattr(domain, failure.error, None)
    if isinstance(kind, type) and issubclass(kind, ConvoyError):
        return kind(failure.text)
    return RuntimeError(f"{failure.error}: {failure.text}")


def _as_failure(error: Exception) -> Failure:
    return Failure(type(error).__name__, str(error))


class Loaded:
    """A version on the GPU. Whoever serves it holds it; with the last of them it goes."""

    def __init__(self, classifier: Classifier, max_batch: int, batch_ms: float) -> None:
        self.device = classifier.device
        self.plan = classifier.plan
        # Each connection brings one batch at a time, from a queue that its worker keeps short.
        self.batcher = MicroBatcher(
            lambda pixels: classifier.predict(pixels).rows(),
            max_batch,
            sys.maxsize,
            batch_ms,
            max_wait_s=math.inf,
        )


class GpuServer:
    """Answers the connections of all workers, a thread each; their images share batches."""

    def __init__(self, planner: Planning, device: str, settings: Settings) -> None:
        self._planner = planner
        self._device = device
        self._settings = settings
        self._loaded: WeakValueDictionary[str, Loaded] = WeakValueDictionary()
        self._loading = Lock()
        self._loading_since: float | None = None
        self._running_time = RunningTime(PASS_S / 10)

    def serve(self, listener: Listener) -> None:
        """Take connections, until ``listener`` fails."""
        Thread(target=self._watch, daemon=True).start()
        while True:
            Thread(target=self._handle, args=(listener.accept(),), daemon=True).start()

    def _watch(self) -> NoReturn:
        """End the process when a forward pass or a load hangs: nothing else could end that."""
        while True:
            time.sleep(PASS_S / 10)
            self._end_if_hung()

    def _end_if_hung(self) -> None:
        """Of its own, as a name left bound while ``_watch`` sleeps would hold a version."""
        ran_s = self._running_time.look()
        since = self._loading_since
        if since is not None and min(time.monotonic() - since, ran_s) > LOAD_S:
            _end_lost(f"a version has not been loaded within {LOAD_S:g} s")
        # Not over the dictionary itself: other threads put versions into it.
        for held in self._loaded.valuerefs():
            loaded = held()
            if loaded is not None and min(loaded.batcher.running_s, ran_s) > PASS_S:
                _end_lost(f"a forward pass has not ended within {PASS_S:g} s")

    def _handle(self, connection: Connection) -> None:
        try:
            with connection:
                wanted = msgspec.json.decode(connection.recv_bytes(), type=Wanted)
                self._serve(connection, wanted)
        except (EOFError, OSError):
            return  # the worker ended, or let go of the version
        except DeviceLost as error:
            _end_lost(str(error))
        except Exception:  # the edge of a thread
            log.exception("a worker's connection ended")

    def _serve(self, connection: Connection, wanted: Wanted) -> None:
        reply, loaded, bundle = Reply(self._device), None, None
        try:
            if self._device != "cpu":
                bundle = open_bundle(Path(wanted.folder), wanted.manifest_sha256)
                if wanted.step == "choose":
                    self._planner.choose(bundle)
                else:
                    loaded = self._hold(bundle)
                    reply = Reply(self._device, loaded.device, loaded.plan)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001 - the edge of a connection: the worker is told
            log.warning("cannot %s %s: %s", wanted.step, wanted.folder, error)
            reply = Reply(self._device, failure=_as_failure(error))
        connection.send_bytes(_encode(reply))
        while loaded and bundle:
            shape = bundle.manifest.preprocess.shape
            pixels = np.frombuffer(connection.recv_bytes(), np.uint8).reshape(-1, *shape)
            connection.send_bytes(_answer(loaded, pixels))

    def _hold(self, bundle: Bundle) -> Loaded:
        """The version of ``bundle``, loaded by whichever worker asks first."""
        with self._loading:
            loaded = self._loaded.get(bundle.manifest_sha256)
            if loaded is None:
                self._loading_since = time.monotonic()
                try:
                    classifier = self._planner.load(bundle)
                finally:
                    self._loading_since = None
                loaded = Loaded(classifier, self._settings.max_batch, self._settings.batch_ms)
                self._loaded[bundle.manifest_sha256] = loaded
            return loaded


def _answer(loaded: Loaded, pixels: Pixels) -> bytes:
    tickets = loaded.batcher.put(list(pixels), ANSWER_S)
    outcomes = [loaded.batcher.wait(ticket) for ticket in tickets]
    scored = [each.row for each in outcomes if isinstance(each, Scored)]
    if len(scored) == len(pixels):
        return _SCORES + np.stack(scored).tobytes()
    # The worker asks again, image by image: one bad one spoils no other's answer.
    error = next(each for each in outcomes if isinstance(each, Exception))
    if isinstance(error, DeviceLost):
        raise error
    return _FAILURE + _encode(_as_failure(error))


def _end_lost(reason: str) -> NoReturn:
    log.error("the GPU was lost: %s; another process takes over", reason)
    os._exit(DEVICE_LOST)  # at once: what is left of the device may hang an orderly end


def main(argv: Sequence[str] | None = None) -> int:
    """Own the device; 2 when a device that was asked for by name does not work.

    Ends when its standard input does. Signals that go to all processes of a service are for
    gunicorn: whoever answers requests that were accepted still needs the device.
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
    Path(address).unlink(missing_ok=True)  # left by a process that this one takes over from
    with Listener(address, "AF_UNIX", backlog=128) as listener:
        GpuServer(planner, device, settings).serve(listener)
    return 0


if __name__ == "__main__":
    sys.exit(main())
