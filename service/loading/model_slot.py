"""``ModelSlot``: one model of a worker, as requests, probes and pages see it."""

from pathlib import Path
from threading import Event, Thread

from registry.canary.traffic_stats import WorkerReport
from registry.core.errors import ModelNotReady
from registry.delivery.deployment import PullStatus, read_status
from registry.model.refs import ModelRef
from service.inference.loaded_model import ActiveVersions, ServedModel
from service.loading.deployment_watcher import DeploymentWatcher
from service.loading.version_loader import ChoosePlan, Load, VersionLoader
from service.loading.version_switch import OnSwitch, VersionSwitch
from service.loading.worker_sync import WorkerGroup

REQUEST_WAITS_S = 1.0


class ModelSlot:
    """Follows what is deployed for one reference.

    Versions are loaded beside the old ones, warmed up and proved on their golden images; once every
    worker of this machine has (``service.loading.worker_sync``), all switch at once.
    """

    def __init__(
        self,
        ref: ModelRef,
        models_folder: Path,
        load: Load,
        choose_plan: ChoosePlan = lambda bundle: None,
        on_switch: OnSwitch = lambda name, before, after: None,
        group: WorkerGroup | None = None,
        keep_warm_s: float = 0.0,
    ) -> None:
        """``keep_warm_s``: for so long a version that was replaced stays in memory."""
        self.ref = ref
        self._models_folder = models_folder
        self._group = group or WorkerGroup()
        self._loader = VersionLoader(ref.name, models_folder, load, choose_plan, keep_warm_s)
        self._switch = VersionSwitch(ref.name, self._group, on_switch)
        self._watcher = DeploymentWatcher(
            ref, models_folder, self._loader, self._switch, self._group, on_switch
        )

    @property
    def error(self) -> str | None:
        """Why what is deployed does not serve here; None if it does."""
        return self._watcher.error

    @property
    def serving(self) -> ActiveVersions | None:
        """What serves; None when nothing was loaded yet, or its device was lost since."""
        return self._switch.serving

    @property
    def current(self) -> ServedModel | None:
        """The champion that serves."""
        serving = self.serving
        return serving.champion if serving else None

    @property
    def running_s(self) -> float:
        """Seconds for which the longest forward pass of what is in memory has been running."""
        return self._loader.running_s

    def require(self) -> ActiveVersions:
        """What serves, read once per request.

        A worker that has nothing yet loads what is deployed now, so that no request fails in the
        moment in which another worker is ready already and this one is not. That takes a second, or
        many on a GPU: it is not for a thread that others wait for.

        Raises:
            ModelNotReady: there is none to load, its plan is still being chosen, or its device was
                lost.
        """
        if self._switch.state.serving is None:
            self._watcher.poll_once(REQUEST_WAITS_S)
        serving = self.serving
        if serving is None:
            was = "its device was lost" if self._switch.state.serving else "not loaded yet"
            raise ModelNotReady(f"{self.ref.name}: {self.error or was}")
        return serving

    def pull_status(self) -> PullStatus:
        """When the puller last agreed with the registry, and what went wrong since."""
        return read_status(self._models_folder, self.ref)

    def workers(self) -> list[WorkerReport]:
        """What every worker of the service serves."""
        return self._group.reports(self.ref.name)

    def poll_once(self) -> bool:
        """Load what is deployed, if its plan is known; whether another version serves now."""
        return self._watcher.poll_once()

    def refresh(self) -> bool:
        """Load what is deployed, choosing its plan first; whether another version serves now."""
        return self._watcher.refresh()

    def start(self, gently: bool = False) -> Event:
        """Load what is deployed, then follow it from a daemon thread until the event is set.

        The first load is waited for, if its plan is known: a worker that takes no connections yet
        refuses none. Choosing a plan would take longer than a worker may to start.

        Args:
            gently: later loads leave the cores to the requests; see ``DeploymentWatcher.watch``.
        """
        self.poll_once()
        stop = Event()
        Thread(
            target=self._watcher.watch,
            args=(stop, gently),
            name=f"slot-{self.ref.name}",
            daemon=True,
        ).start()
        return stop
