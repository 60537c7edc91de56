"""The registry that a command works on."""

from typing import TYPE_CHECKING

from registry.core.paths import convoy_paths

if TYPE_CHECKING:
    from registry.store.mlflow_store import ModelStore


def open_store() -> "ModelStore":
    """The registry of ``CONVOY_HOME`` or ``MLFLOW_TRACKING_URI``."""
    from registry.store.mlflow_store import ModelStore

    return ModelStore(convoy_paths())
