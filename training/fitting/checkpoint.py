"""The state of a run on disk, from which ``--resume`` goes on."""

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch

from registry.core.errors import UsageError
from registry.core.names import sha256_hex
from registry.core.paths import Paths
from training.data.sources import Dataset
from training.fitting.recipes import Recipe

log = logging.getLogger(__name__)


def checkpoint_file(paths: Paths, data: Dataset, recipe: Recipe, seed: int) -> Path:
    """One file for each ``run_key``."""
    key = sha256_hex(msgspec.json.encode(run_key(recipe, data, seed)))[:16]
    return paths.checkpoints / f"{re.sub(r'[^A-Za-z0-9-]', '_', data.name)}-{recipe.name}-{key}.pt"


@contextmanager
def only_training(checkpoint: Path) -> Iterator[None]:
    """Hold the run of ``checkpoint`` against other processes; the system lets go when one dies.

    Raises:
        UsageError: another process trains it now.
    """
    lock = checkpoint.with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UsageError(
                "another training of the same data, recipe and seed is running; wait for it, or "
                "choose another --seed"
            ) from error
        if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
            break
        os.close(descriptor)  # its holder has removed it meanwhile
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def run_key(recipe: Recipe, data: Dataset, seed: int) -> dict[str, Any]:
    """What must agree for a checkpoint to be continued."""
    return {
        "recipe": msgspec.to_builtins(recipe),
        "data_sha256": data.sha256,  # of the pictures in their full size
        "preprocess": msgspec.to_builtins(data.preprocess),
        "seed": seed,
    }


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace ``path``; a disk that is full costs the checkpoint and not the training."""
    temporary = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, temporary)
        temporary.replace(path)  # a crash while writing leaves the older checkpoint
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        log.warning("no checkpoint of this epoch: %s; training goes on", error)
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path | None, key: dict[str, Any]) -> dict[str, Any]:
    """The state in ``path``.

    Raises:
        UsageError: there is none, it cannot be read, or it is not of the run that ``key`` says.
    """
    if path is None or not path.exists():
        raise UsageError(f"there is no checkpoint to resume from at {path}{_others(path)}")
    try:
        state: dict[str, Any] = torch.load(  # noqa: TID251 - what this machine itself has written
            path, map_location="cpu", weights_only=True
        )
    except Exception as error:  # torch raises a dozen kinds on damaged files
        raise UsageError(
            f"the checkpoint {path} cannot be read; delete it and train without --resume"
        ) from error
    if state["key"] != key:
        raise UsageError(
            f"the checkpoint {path} is of a run with another recipe, data set, picture size or seed"
        )
    return state


def _others(path: Path | None) -> str:
    """Checkpoints of the same data and recipe, whose pictures or settings were others."""
    if path is None:
        return ""
    found = sorted(path.parent.glob(f"{path.stem.rpartition('-')[0]}-*.pt"))
    names = ", ".join(each.name for each in found)
    return f"; since {names} the pictures, the settings or the seed have changed" if found else ""
