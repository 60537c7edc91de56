"""Every call to the registry, the file system and torch fails once, in its turn, as curl's torture.

A walk is made again and again; the first time its first call fails, the second time the second,
until one goes through. After any of these faults the error is one that an operator can understand,
the old version serves, nothing half-written is left where it could serve, and the next walk
succeeds. With ``TORTURE=short`` fewer and fewer calls fail: the 1st, 2nd, 4th, 7th, 11th, 17th, …
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
from registry.promotion.promotion import audit, promote
from registry.store import mlflow_store as registry_store
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
WHOLE_UNTIL = 2 if os.environ.get("TORTURE") == "short" else 50
FILES = [
    *((Path, name) for name in ("open", "mkdir", "rename", "replace", "iterdir", "stat", "unlink")),
    *((os, name) for name in ("open", "fsync", "replace", "ftruncate")),
]
REGISTRY = [
    (registry_store, "get_artifact_repository"),
    *(
        (MlflowClient, name)
        for name, _ in inspect.getmembers(MlflowClient, inspect.isfunction)
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
    """The ``number``-th call of any of ``targets`` raises; ``struck`` says whether it came."""

    def __init__(self, number: int, error: Callable[[], BaseException], folder: Path) -> None:
        self._number = number
        self._folder = folder
        self._error = error
        self._calls = 0
        self.struck = ""
        self.after = False
        """Whether the call is made all the same, and only its answer is lost."""

    @contextmanager
    def at(self, targets: list[tuple[Any, str]]) -> Iterator["Fault"]:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in targets:
                patch.setattr(owner, name, self._wrap(getattr(owner, name), name))
            yield self

    def _wrap(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            # Of files, those that serve; MLflow's own, and Python's, are not ours to guard.
            file = next(iter(arguments), None)
            ours = not isinstance(file, str | Path) or self._folder in Path(file).parents
            self._calls += ours
            if ours and self._calls == self._number:
                self.struck = f"call {self._calls}, {name}{arguments[:2]}"
                if self.after:
                    call(*arguments, **named)
                raise self._error()
            return call(*arguments, **named)

        return counted


def every_fault(error: Callable[[], BaseException], folder: Path = Path("/")) -> Iterator[Fault]:
    """Faults for the caller's walk: at its first call, its second, until it makes no more.

    Of calls about files, those about what lies under ``folder``. After the fiftieth (short form:
    the second) more and more are left out: thirty golden pictures are fetched alike.
    """
    number = 0
    while number < MAX_CALLS:
        number += 1 + number // WHOLE_UNTIL
        fault = Fault(number, error, folder)
        yield fault
        if not fault.struck:
            assert number > 3, "the walk makes next to none of these calls: this proves nothing"
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
def test_pulling(
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
            well = Puller(lambda: store, registry_paths, (REF,)).pull_all()  # never raises
        deploy = read_deployment(models, REF)
        assert deploy is not None, fault.struck
        (served,) = deploy.versions
        assert served.version == 2 or not well, fault.struck
        bundle = open_bundle(version_folder(models, "digits", served.version))
        assert bundle.manifest_sha256 == served.manifest_sha256
        bundle.verify(bundle.serving_files())  # what is released is whole
    assert served.version == new.version
    versions = models / "digits" / "versions"
    assert sorted(path.name for path in versions.iterdir()) == ["1", "2"]  # nothing half


@pytest.mark.parametrize(
    ("targets", "error"),
    [(FILES, disk_error), (FILES, no_descriptors), (TORCH, out_of_memory), (TORCH, RuntimeError)],
    ids=["disk-error", "no-descriptors", "torch-memory", "torch-error"],
)
def test_loading(
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
            slot.refresh()  # what it raises, the thread that watches logs
        assert slot.current is not None, fault.struck
        assert slot.current.version == 2 or fault.struck
        pixels = np.zeros((1, *slot.current.manifest.preprocess.shape), np.uint8)
        assert np.isfinite(slot.current.classifier.classify(pixels)).all(), fault.struck
        with pytest.MonkeyPatch.context() as later:
            later.setattr(time, "monotonic", an_hour_later)  # no pause after a failure is that long
            slot.refresh()
        assert slot.current.version == 2, fault.struck
        assert slot.error is None


@pytest.mark.parametrize(
    "lost_answer", [False, True], ids=["never-arrived", "done-but-answer-lost"]
)
def test_promoting(
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
        assert store.aliases("digits")["champion"] in (1, 2), fault.struck
        # What the ledger says stands; who asks again makes the alias agree with it.
        with contextlib.suppress(PromotionRefused):  # it is the champion already
            promote(store, "digits", other, force=True, reason="once more")
        champion = store.aliases("digits")["champion"]
        assert champion == other, fault.struck
        count, faults = audit(store, "digits")
        assert not faults, (fault.struck, faults)
    assert count > 3
