"""Fault injection: each call to the registry, the file system and torch fails once.

Like the torture tests of curl, a test repeats an operation. In the first round the first call
fails, in the second round the second call, until a round makes no more calls. After each fault the
error is one that an operator can understand, the old version serves, nothing half-written is left
where it could serve, and the next round succeeds. ``TORTURE=short`` skips more and more calls: the
1st, 2nd, 4th, 7th, 11th, 17th, … fail.
"""

import contextlib
import errno
import inspect
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from mlflow import MlflowClient

from registry.core.errors import ConvoyError, PromotionRefused
from registry.core.paths import Paths
from registry.delivery.deployment import (
    DeployedVersion,
    read_deployment,
    version_folder,
    write_deployment,
)
from registry.delivery.puller import Puller
from registry.model.bundle import open_bundle
from registry.model.refs import ModelRef, ModelVersion
from registry.promotion.decisions import audit
from registry.promotion.promotion import promote
from registry.store.connection import artifacts
from registry.store.connection.mlflow_sqlite import MlflowSqlite
from registry.store.mlflow_store import ModelStore
from service.loading.model_slot import ModelSlot
from tests.conftest import MakeBundle
from tests.service.conftest import load

pytestmark = pytest.mark.torture


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


REF = ModelRef("digits", alias="champion")
MAX_CALLS = 5000
ALL_CALLS_UNTIL = 2 if os.environ.get("TORTURE") == "short" else 50
FILES = [
    *((Path, name) for name in ("open", "mkdir", "rename", "replace", "iterdir", "stat", "unlink")),
    *((os, name) for name in ("open", "fsync", "replace", "ftruncate")),
]
REGISTRY = [
    (artifacts, "_write"),
    *(
        (client, name)
        for client in (MlflowClient, MlflowSqlite)
        for name, _ in inspect.getmembers(client, inspect.isfunction)
        if not name.startswith("_")
    ),
]
TORCH = [
    (torch, "from_numpy"),
    (torch.Tensor, "softmax"),
    (torch.nn.Linear, "forward"),
    (torch.nn.Module, "load_state_dict"),
    (torch.nn.Module, "to"),
]


class Fault:
    """Makes the ``number``-th call of the targets fail; ``failed_call`` describes that call."""

    def __init__(self, number: int, error: Callable[[], BaseException], folder: Path) -> None:
        self._number = number
        self._folder = folder
        self._error = error
        self._calls = 0
        self.failed_call = ""
        self.after = False
        """Whether to make the call first, so that only its answer is lost."""

    @contextmanager
    def at(self, targets: list[tuple[Any, str]]) -> Iterator["Fault"]:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in targets:
                patch.setattr(owner, name, self._counting(getattr(owner, name), name))
            yield self

    def _counting(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            # Count only calls on files under ``folder``: MLflow and Python use files, too.
            file = next(iter(arguments), None)
            is_counted = not isinstance(file, str | Path) or self._folder in Path(file).parents
            self._calls += is_counted
            if is_counted and self._calls == self._number:
                self.failed_call = f"call {self._calls}, {name}{arguments[:2]}"
                if self.after:
                    call(*arguments, **named)
                raise self._error()
            return call(*arguments, **named)

        return counted


def every_fault(error: Callable[[], BaseException], folder: Path = Path("/")) -> Iterator[Fault]:
    """One fault for each round: at the first call, at the second, until a round has no more calls.

    Calls on files count only if the file is under ``folder``. After the fiftieth call (short form:
    the second) more and more calls are skipped, because many are alike, such as the downloads of
    thirty golden pictures.
    """
    number = 0
    while number < MAX_CALLS:
        number += 1 + number // ALL_CALLS_UNTIL
        fault = Fault(number, error, folder)
        yield fault
        if not fault.failed_call:
            assert number > 3, (
                "the operation makes almost no such calls, so the test proves nothing"
            )
            return
    raise AssertionError(f"more than {MAX_CALLS} calls")


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def read_only() -> OSError:
    return OSError(errno.EROFS, "Read-only file system")


def disk_error() -> OSError:
    return OSError(errno.EIO, "Input/output error")


def no_descriptors() -> OSError:
    return OSError(errno.EMFILE, "Too many open files")


def an_hour_later(monotonic: Callable[[], float] = time.monotonic) -> float:
    return monotonic() + 3600


def unreachable() -> requests.ConnectionError:
    return requests.ConnectionError("connection refused")


def out_of_memory() -> MemoryError:
    return MemoryError("cannot allocate")


@pytest.mark.parametrize(
    ("targets", "error"),
    [(REGISTRY, unreachable), (FILES, disk_full), (FILES, read_only)],
    ids=["registry", "disk-full", "read-only"],
)
def test_after_any_fault_in_a_pull_a_verified_version_is_deployed(
    targets: list[tuple[Any, str]],
    error: Callable[[], BaseException],
    store: ModelStore,
    publish: Callable[..., ModelVersion],
    registry_paths: Paths,
) -> None:
    old, new = publish(seed=0), publish(seed=1)
    promote(store, "digits", 1)
    Puller(lambda: store, registry_paths, (REF,)).pull(REF)
    promote(store, "digits", 2, force=True, reason="test")
    models = registry_paths.models
    for fault in every_fault(error, models):
        before = DeployedVersion(version=1, manifest_sha256=old.manifest_sha256, alias="champion")
        write_deployment(models, REF, (before,))
        shutil.rmtree(version_folder(models, "digits", 2), ignore_errors=True)
        with fault.at(targets):
            succeeded = Puller(lambda: store, registry_paths, (REF,)).pull_all()  # never raises
        deployment = read_deployment(models, REF)
        assert deployment is not None, fault.failed_call
        (served,) = deployment.versions
        assert served.version == 2 or not succeeded, fault.failed_call
        bundle = open_bundle(version_folder(models, "digits", served.version))
        assert bundle.manifest_sha256 == served.manifest_sha256
        bundle.verify(bundle.serving_files())  # the deployed version is complete
    assert served.version == new.version
    versions = models / "digits" / "versions"
    assert sorted(path.name for path in versions.iterdir()) == ["1", "2"]  # and no partial download


@pytest.mark.parametrize(
    ("targets", "error"),
    [(FILES, disk_error), (FILES, no_descriptors), (TORCH, out_of_memory), (TORCH, RuntimeError)],
    ids=["disk-error", "no-descriptors", "torch-memory", "torch-error"],
)
def test_after_any_fault_in_loading_a_version_serves_and_the_next_try_succeeds(
    targets: list[tuple[Any, str]],
    error: Callable[[], BaseException],
    make_bundle: MakeBundle,
    models: Path,
) -> None:
    versions = {
        number: DeployedVersion(
            version=number,
            manifest_sha256=make_bundle(
                seed=number, folder=version_folder(models, "digits", number)
            ).manifest_sha256,
            alias="champion",
        )
        for number in (1, 2)
    }
    for fault in every_fault(error, models):
        write_deployment(models, REF, (versions[1],))
        slot = ModelSlot(REF, models, load)
        assert slot.refresh()
        write_deployment(models, REF, (versions[2],))
        with fault.at(targets), contextlib.suppress(OSError, ConvoyError):
            slot.refresh()  # the watching thread logs what this raises
        assert slot.current is not None, fault.failed_call
        assert slot.current.version == 2 or fault.failed_call
        pixels = np.zeros((1, *slot.current.manifest.preprocess.shape), np.uint8)
        assert np.isfinite(slot.current.classifier.classify(pixels)).all(), fault.failed_call
        with pytest.MonkeyPatch.context() as later:
            later.setattr(time, "monotonic", an_hour_later)  # longer than any pause after a failure
            slot.refresh()
        assert slot.current.version == 2, fault.failed_call
        assert slot.error is None


@pytest.mark.parametrize(
    "lost_answer", [False, True], ids=["never-arrived", "done-but-answer-lost"]
)
def test_after_any_fault_in_a_promotion_the_next_one_repairs_the_aliases(
    lost_answer: bool, store: ModelStore, publish: Callable[..., ModelVersion]
) -> None:
    for seed in (0, 1):
        publish(seed=seed)
    promote(store, "digits", 1)
    champion = 1
    for fault in every_fault(unreachable):
        fault.after = lost_answer
        other = 3 - champion
        with fault.at(REGISTRY), contextlib.suppress(OSError, ConvoyError):
            promote(store, "digits", other, force=True, reason="torture")
        assert store.aliases.read("digits")["champion"] in (1, 2), fault.failed_call
        # The audit log decides; the next promotion makes the alias agree with it.
        with contextlib.suppress(PromotionRefused):  # it is the champion already
            promote(store, "digits", other, force=True, reason="once more")
        champion = store.aliases.read("digits")["champion"]
        assert champion == other, fault.failed_call
        count, faults = audit(store, "digits")
        assert not faults, (fault.failed_call, faults)
    assert count > 3
