"""``VersionLoader``: loads the versions of a deployment, and keeps replaced ones for a while.

If no plan was chosen for a version on this machine yet, the state becomes ``PlanPending``. Choosing
a plan takes minutes, so the caller does that in another thread.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from registry.core.errors import BundleInvalid, PlanUndecided
from registry.core.names import shortened
from registry.delivery.deployment import (
    MAX_ERROR_CHARS,
    DeployedVersion,
    Deployment,
    version_folder,
)
from registry.model.bundle import Bundle, open_bundle
from service.inference.loaded_model import ActiveVersions, ServedModel
from service.memory import trim_heap

RETRY_S = 5.0
# Choosing a plan again, in vain, takes the cores from the version that serves.
MAX_RETRY_S = 300.0
MAX_WARM = 2  # replaced versions that stay in memory

Load = Callable[[Bundle, DeployedVersion], ServedModel]
"""Loads a version. Raises ``PlanUndecided``, rather than choose a plan, if none was chosen yet."""

ChoosePlan = Callable[[Bundle], object]
"""Chooses the plan of a version, however long that takes, so that ``Load`` finds it."""


class Failed(Struct, frozen=True):
    """A deployment could not be loaded. The loader tries again after ``retry_at``.

    ``version`` is the version at fault; None if a device, a disk or the deployment itself is.
    """

    deployment: Deployment | None
    version: int | None
    error: str
    pause_s: float
    retry_at: float

    @property
    def refused(self) -> int | None:
        """The version at fault; None if a device, a disk or the deployment itself is."""
        return self.version


class Loaded(Struct, frozen=True):
    """Nothing has failed since all of the last deployment was loaded, or since the start."""

    error: None = None
    refused: None = None


class PlanPending(Struct, frozen=True):
    """A version cannot be loaded until its plan is chosen. ``before``: its earlier failure."""

    deployment: Deployment
    version: int
    bundle: Bundle
    reason: str
    before: Failed | None

    @property
    def error(self) -> str:
        """The text of the earlier failure, or else why a plan must be chosen."""
        return self.before.error if self.before else self.reason

    @property
    def refused(self) -> int | None:
        """The version at fault for the earlier failure; None if no version was."""
        return self.before.version if self.before else None


class PlanChosen(Struct, frozen=True):
    """The plan of the version with this digest was just chosen; the next poll loads it."""

    manifest_sha256: str
    error: None = None
    refused: None = None


LoadState = Loaded | PlanPending | PlanChosen | Failed


class VersionLoader:
    """The versions of one model in this worker's memory.

    Only one thread at a time may call it, except for ``choose_plan``.
    """

    def __init__(
        self,
        model: str,
        models_folder: Path,
        load: Load,
        choose_plan: ChoosePlan,
        keep_warm_s: float,
    ) -> None:
        """``keep_warm_s``: how long a replaced version stays in memory."""
        self.state: LoadState = Loaded()
        self._model = model
        self._models_folder = models_folder
        self._load = load
        self._choose_plan = choose_plan
        self._keep_warm_s = keep_warm_s
        self._versions: dict[tuple[int, str], ServedModel] = {}
        self._left_at: dict[tuple[int, str], float] = {}

    @property
    def running_s(self) -> float:
        """Seconds for which the longest forward pass of a loaded version has been running."""
        return max((each.batcher.running_s for each in list(self._versions.values())), default=0.0)

    def may_try(self, deployment: Deployment) -> bool:
        """Whether to load ``deployment`` now: it has not failed, or the pause is over."""
        state = self.state
        if isinstance(state, Failed) and state.deployment == deployment:
            return time.monotonic() >= state.retry_at
        if isinstance(state, PlanPending) and state.deployment != deployment:
            self.state = Loaded()
        return True

    def load(
        self, deployment: Deployment, champion: DeployedVersion, alone: bool
    ) -> ActiveVersions | None:
        """The loaded ``deployment``; None if a version cannot be loaded (see ``state``).

        Args:
            deployment: the deployment to load.
            champion: its version that answers requests without a version or alias.
            alone: return the champion alone if the challenger cannot be loaded.
        """
        served = self._load_version(deployment, champion)
        if served is None:
            return None
        serving = ActiveVersions(deployment.key, deployment, served)
        if deployment.challenger is not None:
            challenger = self._load_version(deployment, deployment.challenger)
            if challenger is None:
                return serving if alone else None
            serving = replace(serving, challenger=challenger)
        self.state = Loaded()
        return serving

    def choose_plan(self, pending: PlanPending) -> Exception | None:
        """Choose the pending plan, which takes minutes; returns the error if that fails.

        This is the one method that may run while another thread calls the others.
        """
        try:
            self._choose_plan(pending.bundle)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: the old version stays
            return error
        return None

    def note_choice(self, pending: PlanPending, error: Exception | None) -> None:
        """Note how ``choose_plan`` ended, unless the state has changed meanwhile."""
        if self.state is not pending:
            return
        if error is None:
            self.state = PlanChosen(pending.bundle.manifest_sha256)
            return
        before, pause_s = pending.before, RETRY_S
        if before is not None and before.deployment == pending.deployment:
            pause_s = min(2 * before.pause_s, MAX_RETRY_S)
        self.fail(error, pending.deployment, pending.version, pause_s)

    def fail(
        self,
        error: Exception,
        deployment: Deployment | None,
        version: int | None = None,
        pause_s: float | None = None,
    ) -> None:
        """Note that ``deployment``, or its ``version``, cannot be loaded for now."""
        is_fault = isinstance(error, BundleInvalid)  # otherwise a device or a disk is at fault
        text = str(error) if is_fault else f"{type(error).__name__}: {error}"
        pause_s = RETRY_S if pause_s is None else pause_s
        self.state = Failed(
            deployment,
            version if is_fault else None,
            shortened(text, MAX_ERROR_CHARS),  # probes and the registry show it
            pause_s,
            time.monotonic() + pause_s,
        )

    def keep(self, used: Iterable[ServedModel]) -> None:
        """Free versions not ``used`` for ``keep_warm_s``, and all beyond the last ``MAX_WARM``."""
        in_use = {(each.version, each.manifest_sha256) for each in used}
        now = time.monotonic()
        for key in in_use:
            self._left_at.pop(key, None)
        for key in self._versions.keys() - in_use:
            self._left_at.setdefault(key, now)
        for place, (key, left) in enumerate(sorted(self._left_at.items(), key=lambda row: -row[1])):
            if place >= MAX_WARM or now - left >= self._keep_warm_s:
                del self._versions[key], self._left_at[key]
                trim_heap()

    def forget_all(self) -> None:
        """Forget every version, because their device was lost; each is loaded again when needed."""
        self._versions.clear()
        self._left_at.clear()

    def _load_version(self, deployment: Deployment, wanted: DeployedVersion) -> ServedModel | None:
        """The version, from memory if it is loaded; None if it failed or has no plan yet."""
        key = wanted.version, wanted.manifest_sha256
        if (known := self._versions.get(key)) and not known.classifier.lost:
            return replace(known, alias=wanted.alias)
        if self._is_pending(wanted):
            return None  # do not read the bundle again at every poll
        try:
            folder = version_folder(self._models_folder, self._model, wanted.version)
            bundle = open_bundle(folder, wanted.manifest_sha256)
            fresh = self._load_with_plan(deployment, wanted, bundle)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: the old version stays
            self.fail(error, deployment, wanted.version)
            return None
        if fresh is not None:
            self._versions[key] = fresh
        return fresh

    def _load_with_plan(
        self, deployment: Deployment, wanted: DeployedVersion, bundle: Bundle
    ) -> ServedModel | None:
        """The loaded version; None, with the state ``PlanPending``, if it has no plan yet."""
        state = self.state
        try:
            return self._load(bundle, wanted)
        except PlanUndecided as error:
            if state == PlanChosen(bundle.manifest_sha256):
                raise BundleInvalid("the plan that was just chosen cannot be loaded") from error
            before = state if isinstance(state, Failed) else None
            if before is not None and before.deployment != deployment:
                before = None
            self.state = PlanPending(deployment, wanted.version, bundle, str(error), before)
            return None

    def _is_pending(self, wanted: DeployedVersion) -> bool:
        if not isinstance(self.state, PlanPending):
            return False
        return self.state.bundle.manifest_sha256 == wanted.manifest_sha256
