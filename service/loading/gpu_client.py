"""Lets a worker run plans in the process that owns the GPU: pixels go over a Unix socket.

A connection serves one version to one worker. The worker names the version when it opens the
connection. The GPU's process frees the version when the last of its connections closes.
"""

import socket
import struct
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Literal, NoReturn, Protocol

import msgspec
import numpy as np
from msgspec import Struct

from registry.core import errors as domain
from registry.core.errors import ConvoyError, DeviceLost
from registry.model.bundle import Bundle
from registry.model.classifier import Classifier
from registry.model.image.decode import Pixels
from registry.model.plans.base import Outputs

LOAD_S = 120.0  # capturing a large network's graphs, for every batch size, takes tens of seconds
ANSWER_S = 30.0  # the GPU's process ends itself when a forward pass takes 20 s
SCORES, FAILURE = b"\0", b"\1"
_encode = msgspec.json.encode


class PlanLoader(Protocol):
    """Chooses and loads plans. ``Planner`` and ``GpuPlanner`` are the two that do."""

    def load(self, bundle: Bundle) -> Classifier:
        """The classifier of ``bundle``; raises ``PlanUndecided`` if its plan is not chosen yet."""

    def choose(self, bundle: Bundle) -> object:
        """Choose the plan of ``bundle``, however long that takes."""


class LoadRequest(Struct, frozen=True):
    """The first message of a connection: what the GPU's process should do with a bundle."""

    step: Literal["load", "choose"]
    folder: str
    manifest_sha256: str


class RemoteError(Struct, frozen=True):
    """An error that is sent to a worker: the name of its class, and its text."""

    error: str
    text: str


class LoadResponse(Struct, frozen=True):
    """The answer to ``LoadRequest``; for the device ``cpu`` the worker loads the version itself."""

    device: str
    shown_device: str = ""
    plan: str = ""
    failure: RemoteError | None = None


class GpuPlanner:
    """A ``PlanLoader`` whose plans run in the process that owns the GPU."""

    def __init__(self, address: Path, on_cpu: PlanLoader) -> None:
        """``address``: that process's socket. ``on_cpu``: used if that process found no GPU."""
        self._address = address
        self._on_cpu = on_cpu

    def load(self, bundle: Bundle) -> Classifier:
        """The classifier of ``bundle``, which runs in the GPU's process.

        Raises:
            DeviceLost: that process does not answer; the supervisor starts another.
            PlanUndecided, BundleInvalid: as ``Planner.load``.
        """
        connection, reply = self._ask("load", bundle, LOAD_S)
        if reply.device == "cpu":
            connection.close()
            return self._on_cpu.load(bundle)
        remote = RemotePredict(connection, len(bundle.manifest.labels))
        return Classifier(remote, reply.plan, reply.shown_device, is_lost=remote.is_lost)

    def choose(self, bundle: Bundle) -> None:
        """Choose the plan of ``bundle``, which may take minutes.

        Raises:
            DeviceLost, BundleInvalid: as ``load``.
        """
        connection, reply = self._ask("choose", bundle, None)
        connection.close()
        if reply.device == "cpu":
            self._on_cpu.choose(bundle)

    def _ask(
        self, step: Literal["load", "choose"], bundle: Bundle, timeout_s: float | None
    ) -> tuple[Connection, LoadResponse]:
        wanted = LoadRequest(step, str(bundle.folder.resolve()), bundle.manifest_sha256)
        try:
            connection = Client(str(self._address), "AF_UNIX")
            connection.send_bytes(_encode(wanted))
            if not connection.poll(timeout_s):
                connection.close()
                raise DeviceLost(
                    f"the process that owns the GPU did not {step} a plan in {timeout_s:g} s"
                )
            reply = msgspec.json.decode(connection.recv_bytes(), type=LoadResponse)
        except (OSError, EOFError) as error:
            raise DeviceLost("the process that owns the GPU is not running") from error
        if reply.failure:
            connection.close()
            raise _as_error(reply.failure)
        return connection, reply


class RemotePredict:
    """A ``PredictFn`` that runs the forward pass in the GPU's process."""

    def __init__(self, connection: Connection, classes: int) -> None:
        self._connection = connection
        self._classes = classes
        # Without a time-out, sending a batch larger than the socket's buffer could block for ever.
        limit = struct.pack("ll", int(ANSWER_S), int(ANSWER_S % 1 * 1e6))
        with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def __call__(self, pixels: Pixels) -> Outputs:
        """Logits, and features if the network has them, of uint8 (N, height, width, channels).

        Not thread-safe: one batch at a time uses the connection.

        Raises:
            DeviceLost: the GPU's process has ended, or did not answer in ``ANSWER_S``.
            ConvoyError: the GPU's process raised it.
            RuntimeError: the GPU's process raised another error.
        """
        try:
            self._connection.send_bytes(np.ascontiguousarray(pixels).reshape(-1).data)
            if not self._connection.poll(ANSWER_S):
                self._lose(f"did not answer in {ANSWER_S:g} s")
            answer = self._connection.recv_bytes()
        except (OSError, EOFError) as error:
            self._lose("has ended", error)
        if answer[:1] == FAILURE:
            raise _as_error(msgspec.json.decode(answer[1:], type=RemoteError))
        rows = np.frombuffer(answer, np.float32, offset=1).reshape(len(pixels), -1)
        return Outputs.from_rows(rows, self._classes)

    def is_lost(self) -> bool:
        """Whether the connection has ended. Call it between two forward passes only.

        The other end sends nothing unasked, so data to read then can only be the end.
        """
        return self._connection.closed or self._connection.poll()

    def _lose(self, what: str, error: Exception | None = None) -> NoReturn:
        """Close the connection: a late answer would be taken for that of the next batch."""
        self._connection.close()
        raise DeviceLost(f"the process that owns the GPU {what}") from error


def _as_error(failure: RemoteError) -> Exception:
    kind = getattr(domain, failure.error, None)
    if isinstance(kind, type) and issubclass(kind, ConvoyError):
        return kind(failure.text)
    return RuntimeError(f"{failure.error}: {failure.text}")


def as_remote_error(error: Exception) -> RemoteError:
    """``error`` in the form in which the GPU's process sends it to a worker."""
    return RemoteError(type(error).__name__, str(error))
