"""``ModelSlot``: one model of a worker, for requests, probes and pages."""

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
    """Follows the deployment of one reference, such as ``models:/fashion@champion``.

    A new version is loaded while the old one serves, warmed up, and checked on its golden images.
    Once every worker of this machine has done that (``service.loading.worker_sync``), all switch
    at one moment.
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
        """Create a slot with nothing loaded.

        Args:
            ref: the reference to follow.
            models_folder: where the puller writes deployments and versions.
            load: loads a version.
            choose_plan: chooses a version's plan.
            on_switch: called after each switch, and when a deployment cannot be loaded.
            group: the workers to switch with; by default this worker alone.
            keep_warm_s: how long a replaced version stays in memory.
        """
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
        """Why the current deployment does not serve here; None if it does."""
        return self._watcher.error

    @property
    def serving(self) -> ActiveVersions | None:
        """The versions that serve; None if none was loaded yet, or their device was lost."""
        return self._switch.serving

    @property
    def current(self) -> ServedModel | None:
        """The champion that serves; None if none does."""
        serving = self.serving
        return serving.champion if serving else None

    @property
    def running_s(self) -> float:
        """Seconds for which the longest forward pass of any loaded version has been running."""
        return self._loader.running_s

    def require(self) -> ActiveVersions:
        """The versions that serve, read once per request.

        If none is loaded, this loads the current deployment, so that no request fails while another
        worker is ready and this one is not yet. That takes a second, or many on a GPU, so a thread
        that others wait for must not call it.

        Raises:
            ModelNotReady: nothing is deployed, its plan is still being chosen, or its device was
                lost.
        """
        if self._switch.state.serving is None:
            self._watcher.poll_once(REQUEST_WAITS_S)
        serving = self.serving
        if serving is None:
            reason = "its device was lost" if self._switch.state.serving else "not loaded yet"
            raise ModelNotReady(f"{self.ref.name}: {self.error or reason}")
        return serving

    def pull_status(self) -> PullStatus:
        """When the puller last agreed with the registry, and what went wrong since."""
        return read_status(self._models_folder, self.ref)

    def workers(self) -> list[WorkerReport]:
        """What every worker of the service serves, has prepared, or cannot load."""
        return self._group.reports(self.ref.name)

    def poll_once(self) -> bool:
        """Load the current deployment if its plan is known; returns whether it was switched to."""
        return self._watcher.poll_once()

    def refresh(self) -> bool:
        """As ``poll_once``, but choose the plan of the deployment first if it is unknown."""
        return self._watcher.refresh()

    def start(self, gently: bool = False) -> Event:
        """Load the current deployment, then follow it from a daemon thread until the event is set.

        This waits for the first load if its plan is known, because a worker that does not listen
        yet refuses no client. It does not wait for a plan: gunicorn would kill the worker first.

        Args:
            gently: later loads leave the cores to requests; see ``DeploymentWatcher.watch``.
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
