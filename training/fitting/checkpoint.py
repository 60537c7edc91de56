"""Saves the state of a run to disk, so that ``--resume`` can continue from it."""

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
    """The path of the checkpoint; each ``run_key`` has a file of its own."""
    key = sha256_hex(msgspec.json.encode(run_key(recipe, data, seed)))[:16]
    return paths.checkpoints / f"{re.sub(r'[^A-Za-z0-9-]', '_', data.name)}-{recipe.name}-{key}.pt"


@contextmanager
def only_training(checkpoint: Path) -> Iterator[None]:
    """Lock the run of ``checkpoint`` against other processes.

    The kernel releases the lock when the process ends, however it ends.

    Raises:
        UsageError: another process is training this run.
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
        os.close(descriptor)  # the last holder deleted the file after we opened it: try again
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def run_key(recipe: Recipe, data: Dataset, seed: int) -> dict[str, Any]:
    """The facts that must be equal for a run to continue from a checkpoint."""
    return {
        "recipe": msgspec.to_builtins(recipe),
        "data_sha256": data.sha256,  # of the pictures at full size
        "preprocess": msgspec.to_builtins(data.preprocess),
        "seed": seed,
    }


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace ``path`` by ``state``; if the disk is full, log a warning and let training go on."""
    temporary = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, temporary)
        temporary.replace(path)  # atomic: a crash while writing leaves the older checkpoint
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        log.warning("the checkpoint of this epoch was not saved: %s; training goes on", error)
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path | None, key: dict[str, Any]) -> dict[str, Any]:
    """The state in ``path``.

    Raises:
        UsageError: there is no checkpoint, it cannot be read, or it belongs to a run with another
            ``key``.
    """
    if path is None or not path.exists():
        raise UsageError(f"there is no checkpoint to resume from at {path}{_others(path)}")
    try:
        state: dict[str, Any] = torch.load(  # noqa: TID251 - this machine wrote the file itself
            path, map_location="cpu", weights_only=True
        )
    except Exception as error:  # torch raises a dozen kinds on damaged files
        raise UsageError(
            f"the checkpoint {path} cannot be read; delete it and train without --resume"
        ) from error
    if state["key"] != key:
        raise UsageError(
            f"the checkpoint {path} belongs to a run with another recipe, data set, picture size "
            "or seed; repeat that run's arguments, or train without --resume"
        )
    return state


def _others(path: Path | None) -> str:
    """A hint that names checkpoints of the same data and recipe with other pictures or settings."""
    if path is None:
        return ""
    found = sorted(path.parent.glob(f"{path.stem.rpartition('-')[0]}-*.pt"))
    names = ", ".join(each.name for each in found)
    return f"; since {names} the pictures, the settings or the seed have changed" if found else ""
