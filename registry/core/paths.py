"""Where Convoy keeps its files, read from the environment in one place for all three packages."""

import os
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from registry.core.errors import UsageError


class Paths(Struct, frozen=True):
    """The folder tree under ``CONVOY_HOME``. Nothing is created until it is written to."""

    root: Path

    @property
    def models(self) -> Path:
        """The puller's files: ``<name>/versions/<n>`` and ``<name>/deployment@<alias>.json``."""
        return self.root / "models"

    @property
    def plans(self) -> Path:
        """The name of the plan that is fastest here, for each version: a cache."""
        return self.root / "plans"

    def policy(self, name: str) -> Path:
        """What a challenger of the model ``name`` may lose; the default policy without it."""
        return self.root / "policies" / f"{name}.toml"

    @property
    def gate_results(self) -> Path:
        """What the gate said lately: a cache."""
        return self.root / "gate-results"

    @property
    def tokens(self) -> Path:
        """Who may use the service and the control plane, in a folder that both may see."""
        return self.root / "tokens" / "tokens.json"

    @property
    def sessions(self) -> Path:
        """The sessions of the control plane's pages, which survive its restart."""
        return self.root / "sessions" / "sessions.json"

    @property
    def reports(self) -> Path:
        """Pictures of training reports that somebody has looked at: a cache."""
        return self.root / "reports"

    @property
    def decided(self) -> Path:
        """Touched when something was decided, so that pullers on this machine look at once."""
        return self.root / "decided"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def datasets(self) -> Path:
        return self.root / "datasets"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def tracking_uri(self) -> str:
        """``MLFLOW_TRACKING_URI`` where it is set, else SQLite under the home folder."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"


def convoy_paths(environment: Mapping[str, str] = os.environ) -> Paths:
    """The home folder: ``CONVOY_HOME``, by default ``var/`` in the working directory.

    Raises:
        UsageError: its path has a character that means something else in a database's address.
    """
    paths = Paths(Path(environment.get("CONVOY_HOME") or "var").resolve())
    if bad := set("?#%") & set(str(paths.root)):
        raise UsageError(f"CONVOY_HOME is {paths.root}; its path must be without {' '.join(bad)}")
    return paths
