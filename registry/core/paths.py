"""Where Convoy keeps its files. All three packages read these paths from the environment here."""

import os
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from registry.core.errors import UsageError


class Paths(Struct, frozen=True):
    """The folder tree under ``CONVOY_HOME``. A folder is created at the first write to it."""

    root: Path

    @property
    def models(self) -> Path:
        """The puller's files: ``<name>/versions/<n>`` and ``<name>/deployment@<alias>.json``."""
        return self.root / "models"

    @property
    def plans(self) -> Path:
        """A cache: for each version, the plan that is fastest on this machine."""
        return self.root / "plans"

    def policy(self, name: str) -> Path:
        """The policy of the model ``name``. Without this file, the default policy applies."""
        return self.root / "policies" / f"{name}.toml"

    @property
    def gate_results(self) -> Path:
        """A cache of recent gate results."""
        return self.root / "gate-results"

    @property
    def tokens(self) -> Path:
        """The tokens of the service and of the control plane, in a folder that both can read."""
        return self.root / "tokens" / "tokens.json"

    @property
    def sessions(self) -> Path:
        """The sessions of the control plane's pages. They survive its restart."""
        return self.root / "sessions" / "sessions.json"

    @property
    def reports(self) -> Path:
        """A cache of the images of training reports that somebody has opened."""
        return self.root / "reports"

    @property
    def decided(self) -> Path:
        """Touched after each decision, so that pullers on this machine poll at once."""
        return self.root / "decided"

    @property
    def artifacts(self) -> Path:
        """MLflow's files of runs and versions, unless a tracking server keeps them."""
        return self.root / "artifacts"

    @property
    def datasets(self) -> Path:
        """Downloaded data sets, and validation pictures while a network trains."""
        return self.root / "datasets"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints of unfinished training runs, one ``.pt`` file for each."""
        return self.root / "checkpoints"

    @property
    def tracking_uri(self) -> str:
        """``MLFLOW_TRACKING_URI`` if it is set, else SQLite under the home folder."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"


def convoy_paths(environment: Mapping[str, str] = os.environ) -> Paths:
    """The paths under ``CONVOY_HOME``, by default ``var/`` in the working directory.

    Raises:
        UsageError: the path has a character with a special meaning in a database's address.
    """
    paths = Paths(Path(environment.get("CONVOY_HOME") or "var").resolve())
    if bad := set("?#%") & set(str(paths.root)):
        raise UsageError(f"CONVOY_HOME is {paths.root}; set it to a path without {' '.join(bad)}")
    return paths
