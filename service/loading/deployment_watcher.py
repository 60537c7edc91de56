"""``DeploymentWatcher``: keeps one model of a worker at the version that is deployed."""

import logging
import os
from pathlib import Path
from threading import Event, Lock, Thread, get_native_id

from msgspec.structs import replace

from registry.canary.traffic_stats import WorkerReport
from registry.core.errors import BundleInvalid
from registry.delivery.deployment import DeployedVersion, Deployment, read_deployment
from registry.model.refs import ModelRef
from service.loading.version_loader import Failed, Loaded, PlanPending, VersionLoader
from service.loading.version_switch import OnSwitch, VersionSwitch
from service.loading.worker_sync import WorkerGroup

log = logging.getLogger(__name__)

POLL_S = 0.05
LOADING_NICE = 10


class DeploymentWatcher:
    """Makes one worker serve the current deployment of one model. Any thread may call it."""

    def __init__(
        self,
        ref: ModelRef,
        models_folder: Path,
        loader: VersionLoader,
        switch: VersionSwitch,
        group: WorkerGroup,
        on_switch: OnSwitch,
    ) -> None:
        self._ref = ref
        self._models_folder = models_folder
        self._loader = loader
        self._switch = switch
        self._group = group
        self._on_switch = on_switch
        self._polling = Lock()
        self._announced: str | None = None

    @property
    def error(self) -> str | None:
        """Why the current deployment does not serve here; None if it does."""
        return self._loader.state.error or self._switch.waiting

    def poll_once(self, timeout_s: float = -1) -> bool:
        """Load the current deployment if it is new. Returns whether this worker switched to it.

        Chooses no plan. If another thread is polling, waits ``timeout_s`` for it and then returns
        False; -1 waits without a limit.
        """
        if not self._polling.acquire(timeout=timeout_s):
            return False
        try:
            before = self._switch.state.serving
            self._adopt()
            self._prepare()
            self._switch.commit()
            self._adopt()
            self._loader.keep(self._switch.in_use())
            self._report()
            self._announce()
            return self._switch.state.serving not in (None, before)
        finally:
            self._polling.release()

    def refresh(self) -> bool:
        """As ``poll_once``, but first choose a plan if none was chosen on this machine yet.

        The old version keeps serving meanwhile, and also if this fails.
        """
        switched = self.poll_once()
        pending = self._loader.state
        if not isinstance(pending, PlanPending):
            return switched
        error = self._loader.choose_plan(pending)
        with self._polling:
            self._loader.note_choice(pending, error)
            self._report()
        return self.poll_once()

    def watch(self, stop: Event, gently: bool = False) -> None:
        """Poll until ``stop`` is set. Plans are chosen in a second thread: that may take minutes.

        Args:
            stop: ends the polling.
            gently: give this thread a lower priority, which leaves the cores to requests. Not for
                engines with threads of their own, which would inherit it.
        """
        if gently:
            # Linux changes the priority of this thread alone. A still lower one could make requests
            # wait long for this thread to release the interpreter when all cores are busy.
            os.setpriority(os.PRIO_PROCESS, get_native_id(), LOADING_NICE)
        choosing: Thread | None = None
        while True:
            try:
                self.poll_once()
            except Exception:  # the edge of a thread: a full disk must not end it
                log.exception("%s: polling for a deployment failed", self._ref.name)
            is_pending = isinstance(self._loader.state, PlanPending)
            if is_pending and (choosing is None or not choosing.is_alive()):
                choosing = Thread(target=self.refresh, daemon=True)
                choosing.start()
            if stop.wait(POLL_S):
                return

    def _adopt(self) -> None:
        adopted = self._switch.adopt()
        if adopted is not None and adopted.whole:
            self._loader.state = Loaded()

    def _prepare(self) -> None:
        """Load the wanted deployment, as far as that is possible now."""
        self._forget_lost()
        deployment: Deployment | None = None
        try:
            deployment = self._wanted()
            champion = self._champion(deployment)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: the old version stays
            self._loader.fail(error, deployment)
            return
        may_try = self._loader.may_try(deployment)
        if held := self._switch.find(deployment):
            is_active = held is self._switch.state.serving
            self._switch.prepare(None if is_active else held, self._report)
            if is_active:
                self._loader.state = Loaded()
        elif may_try:
            is_first = self._switch.state.serving is None
            fresh = self._loader.load(deployment, champion, alone=is_first)
            self._switch.prepare(fresh, self._report)

    def _wanted(self) -> Deployment:
        """The deployment to serve; a worker that starts late begins with that of the others."""
        others, state = self._switch.others_serve(), self._loader.state
        failed = state.deployment if isinstance(state, Failed) else None
        if others is not None and others != failed:
            return others
        deployment = read_deployment(self._models_folder, self._ref)
        if deployment is None:
            raise BundleInvalid(f"nothing is deployed; run: convoy pull {self._ref}")
        return deployment

    def _champion(self, deployment: Deployment) -> DeployedVersion:
        """The version of ``deployment`` that this worker was asked to serve."""
        found = deployment.find(self._ref)
        if found is None:
            raise BundleInvalid(f"the deployment has no {self._ref}; waiting for the puller")
        return found

    def _forget_lost(self) -> None:
        """Forget a version whose device was lost, so that it is loaded again."""
        name, serving = self._ref.name, self._switch.state.serving
        if serving is None:
            return
        for served in filter(None, (serving.champion, serving.challenger)):
            served.classifier.check()
        if serving.champion.classifier.lost:
            log.error("%s: the device %s was lost; loading again", name, serving.champion.device)
            self._loader.forget_all()
            self._switch.replace_serving(None)
        elif serving.challenger and serving.challenger.classifier.lost:
            log.error("%s: the challenger's device was lost; loading again", name)
            self._switch.replace_serving(replace(serving, challenger=None))

    def _report(self) -> None:
        """Report to the other workers what this one serves, has prepared, or cannot load."""
        held, state = self._switch.state, self._loader.state
        serving, prepared = held.serving, held.prepared
        self._group.report(
            WorkerReport(
                pid=os.getpid(),
                model=self._ref.name,
                version=serving.champion.version if serving else None,
                generation=serving.deployment.generation if serving else None,
                serving_key=serving.key if serving else 0,
                prepared_key=prepared.key if prepared else 0,
                error=self.error,
                refused=state.refused,
            )
        )

    def _announce(self) -> None:
        """Log and count a failure, once."""
        state, serving = self._loader.state, self._switch.serving
        if isinstance(state, Failed) and state.error != self._announced:
            current = serving.champion if serving else None
            text = f"version {current.version} keeps serving" if current else "nothing serves"
            log.warning("%s: %s; %s", self._ref.name, state.error, text)
            if state.deployment is not None:
                self._on_switch(self._ref.name, current, None)
        self._announced = state.error
