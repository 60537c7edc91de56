"""``ModelSlot``: where the serving versions of one model live, and how the next ones take over.

Whole ``ServedModel``s are built beside the old ones, warmed up and proved on their golden images;
once every worker of the service has (``service.loading.worker_sync``), all switch at once. Requests
that hold the old object finish on it.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Lock, Thread, get_native_id

from msgspec import Struct
from msgspec.structs import replace

from registry.canary.traffic_stats import WorkerReport
from registry.core.errors import BundleInvalid, ModelNotReady, PlanUndecided
from registry.core.names import shortened
from registry.delivery.deployment import (
    MAX_ERROR_CHARS,
    PullStatus,
    Release,
    ReleasedVersion,
    read_release,
    read_status,
    version_folder,
)
from registry.model.bundle import Bundle, open_bundle
from registry.model.refs import ModelRef
from service.inference.loaded_model import ServedModel, Serving
from service.loading.worker_sync import Crew
from service.malloc import give_back

log = logging.getLogger(__name__)

POLL_S = 0.05
RETRY_S = 5.0
# Finding out anew that no plan can serve a version takes the cores from the one that serves.
MOST_RETRY_S = 300.0
REQUEST_WAITS_S = 1.0
LOADING_NICE = 10
MOST_WARM = 2  # versions that do not serve any more
# A worker that prepares takes a second; one that does not is worth a word.
WAITING_S = 5.0


class Held(Struct, frozen=True):
    """What a slot serves, and what it has ready. One reference, so that it is read as one."""

    serving: Serving | None = None
    prepared: Serving | None = None


class Undecided(Struct, frozen=True):
    """A version whose plan has to be chosen before it can be loaded."""

    release: Release
    version: int
    bundle: Bundle


class Failure(Struct, frozen=True):
    """What could not be served, and when that is tried again.

    ``version`` is the one whose fault it is; None: a device's, a disk's, the release's.
    """

    release: Release | None
    version: int | None
    pause_s: float
    retry_at: float


OnSwap = Callable[[str, ServedModel | None, ServedModel | None], None]
"""Told the model's name, what served before, and what serves now (None: it was refused)."""

Load = Callable[[Bundle, ReleasedVersion], ServedModel]
"""Loads a version; raises ``PlanUndecided`` rather than spend the time that choosing one takes."""

Decide = Callable[[Bundle], object]
"""Chooses the plan of a version, however long it takes, so that it can be loaded."""


class ModelSlot:
    """Follows what is released for one reference."""

    def __init__(
        self,
        ref: ModelRef,
        models_folder: Path,
        load: Load,
        decide: Decide = lambda bundle: None,
        on_swap: OnSwap = lambda name, before, after: None,
        crew: Crew | None = None,
        keep_warm_s: float = 0.0,
    ) -> None:
        """``keep_warm_s``: for so long a version that was replaced stays in memory."""
        self.ref = ref
        self.error: str | None = None
        self._crew = crew or Crew()
        self._post = self._crew.post(ref.name)
        self._held = Held()
        self._models_folder = models_folder
        self._load = load
        self._decide = decide
        self._on_swap = on_swap
        self._keep_warm_s = keep_warm_s
        self._loaded: dict[tuple[int, str], ServedModel] = {}
        self._left_at: dict[tuple[int, str], float] = {}
        self._refreshing = Lock()
        self._failure: Failure | None = None
        self._undecided: Undecided | None = None
        self._decided: str | None = None  # a manifest's digest: a trial has two to choose
        self._waiting_since: float | None = None

    @property
    def serving(self) -> Serving | None:
        """What the crew serves; None when nothing was loaded yet, or its device was lost since."""
        for _ in range(2):  # between the two reads another may have been prepared and switched to
            held, key = self._held, self._post.key
            for each in (held.serving, held.prepared):
                if each is not None and each.key == key:
                    return None if each.champion.classifier.lost else each
        return None

    @property
    def current(self) -> ServedModel | None:
        """The champion that serves."""
        serving = self.serving
        return serving.champion if serving else None

    @property
    def running_s(self) -> float:
        """For how long the longest forward pass of what is in memory has been running."""
        return max((each.batcher.running_s for each in list(self._loaded.values())), default=0.0)

    def require(self) -> Serving:
        """What serves, read once per request.

        A worker that has nothing yet loads what is released now, so that no request fails in the
        moment in which another worker is ready already and this one is not. That takes a second, or
        many on a GPU: it is not for a thread that others wait for.

        Raises:
            ModelNotReady: there is none to load, its plan is still being chosen, or its device was
                lost.
        """
        if self._held.serving is None:
            self._look(REQUEST_WAITS_S)
        serving = self.serving
        if serving is None:
            was = "its device was lost" if self._held.serving else "not loaded yet"
            raise ModelNotReady(f"{self.ref.name}: {self.error or was}")
        return serving

    def pull_status(self) -> PullStatus:
        return read_status(self._models_folder, self.ref)

    def workers(self) -> list[WorkerReport]:
        """What every worker of the service serves."""
        return self._crew.reports(self.ref.name)

    def refresh(self) -> bool:
        """Prepare what is released if it is not what serves; whether a swap happened.

        If its plan was never chosen on this machine, that is done first, while the old version
        serves on. A failure keeps the old version, is logged once, and stands in ``error`` until it
        is mended.
        """
        swapped = self._look()
        if self._undecided is None:
            return swapped
        self._decide_undecided()
        return self._look()

    def watch(self, stop: Event) -> None:
        """Look until ``stop`` is set; plans are chosen beside that, as it may take minutes."""
        deciding: Thread | None = None
        while True:
            try:
                self._look()
            except Exception:  # the edge of a thread: a full disk must not end it
                log.exception("%s: looking for a release failed", self.ref.name)
            if self._undecided is not None and (deciding is None or not deciding.is_alive()):
                deciding = Thread(target=self.refresh, daemon=True)
                deciding.start()
            if stop.wait(POLL_S):
                return

    def start(self, gently: bool = False) -> Event:
        """Load what is released, then watch from a daemon thread until the event is set.

        The first load is waited for, if its plan is known: a worker that takes no connections yet
        refuses none. Choosing a plan would take longer than a worker may to start.

        Args:
            gently: later loads leave the cores to the requests. Not for engines with threads of
                their own: those would inherit it.
        """
        self._look()
        stop = Event()

        def watch() -> None:
            if gently:
                # Of this thread alone, on Linux. Lower, and who waits for it to let go of the
                # interpreter could wait for long when all cores are busy.
                os.setpriority(os.PRIO_PROCESS, get_native_id(), LOADING_NICE)
            self.watch(stop)

        Thread(target=watch, name=f"slot-{self.ref.name}", daemon=True).start()
        return stop

    def _decide_undecided(self) -> None:
        """Choose the plan that a load has missed."""
        undecided = self._undecided
        if undecided is None:
            return
        failure: Exception | None = None
        try:
            self._decide(undecided.bundle)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: the old version serves on
            failure = error
        with self._refreshing:
            if self._undecided is undecided:
                self._undecided = None
            if failure is None:
                self._decided = undecided.bundle.manifest_sha256
                return
            before, pause_s = self._failure, RETRY_S
            if before is not None and before.release == undecided.release:
                pause_s = min(2 * before.pause_s, MOST_RETRY_S)
            self._note_failure(failure, undecided.release, undecided.version, pause_s)
            self._report()

    def _look(self, patience_s: float = -1) -> bool:
        """``refresh`` without choosing a plan; not at all if others look for ``patience_s`` yet."""
        if not self._refreshing.acquire(timeout=patience_s):
            return False
        try:
            before = self._held.serving
            self._adopt()
            self._prepare()
            self._switch()
            self._adopt()
            self._let_go()
            self._report()
            return self._held.serving not in (None, before)
        finally:
            self._refreshing.release()

    def _prepare(self) -> None:
        """Have what is wanted loaded, as far as that can be done now."""
        self._forget_lost()
        release: Release | None = None
        try:
            release = self._wanted()
            wanted = self._choose(release)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: the old version serves on
            self._note_failure(error, release, None, RETRY_S)
            return
        if self._undecided is not None and self._undecided.release != release:
            self._undecided = None
        for held in (self._held.serving, self._held.prepared):
            if held is not None and held.release == release and held.whole:
                self._hold_prepared(held if held is self._held.prepared else None)
                if held is self._held.serving:
                    self.error = self._failure = None
                return
        failed = self._failure
        if failed and failed.release == release and time.monotonic() < failed.retry_at:
            return
        fresh = self._load_release(release, wanted)
        if fresh is not None and fresh.whole:
            self.error = self._failure = None
        self._hold_prepared(fresh)

    def _wanted(self) -> Release:
        """What is released; a worker that comes late begins with what the others serve."""
        serving = self._held.serving
        others = self._post.release if serving is None else None
        failed = self._failure.release if self._failure else None
        if others is not None and others != failed:
            return others
        release = read_release(self._models_folder, self.ref)
        if release is None:
            raise BundleInvalid(f"nothing is released; run: python -m registry pull {self.ref}")
        return release

    def _load_release(self, release: Release, wanted: ReleasedVersion) -> Serving | None:
        """All of ``release``, whose champion is ``wanted``, or what of it can serve meanwhile.

        None if that is nothing new.

        A challenger that fails stops the switch to its trial. But where nothing serves yet, the
        champion does so alone.
        """
        champion = self._load_version(release, wanted)
        if champion is None:
            return None
        alone = Serving(release.key, release, champion)
        if (tried := release.challenger) is None:
            return alone
        challenger = self._load_version(release, tried)
        if challenger is None:
            return alone if self._held.serving is None else None
        return replace(alone, challenger=challenger)

    def _load_version(self, release: Release, wanted: ReleasedVersion) -> ServedModel | None:
        """The version, from memory if it is there; None if it failed or has no plan yet."""
        key = wanted.version, wanted.manifest_sha256
        if (known := self._loaded.get(key)) and not known.classifier.lost:
            return replace(known, alias=wanted.alias)
        if self._undecided and self._undecided.bundle.manifest_sha256 == wanted.manifest_sha256:
            return None  # it would be read again at every look
        folder = version_folder(self._models_folder, self.ref.name, wanted.version)
        try:
            bundle = open_bundle(folder, wanted.manifest_sha256)
            fresh = self._load_decided(release, wanted, bundle)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: the old version serves on
            self._note_failure(error, release, wanted.version, RETRY_S)
            return None
        if fresh is not None:
            self._loaded[key] = fresh
        return fresh

    def _load_decided(
        self, release: Release, wanted: ReleasedVersion, bundle: Bundle
    ) -> ServedModel | None:
        """The version, loaded; None, and noted, if its plan has to be chosen first."""
        try:
            return self._load(bundle, wanted)
        except PlanUndecided as error:
            if self._decided == bundle.manifest_sha256:
                self._decided = None
                raise BundleInvalid("the plan that was just chosen cannot be loaded") from error
            self._undecided = Undecided(release, wanted.version, bundle)
            if self._failure is None or self._failure.release != release:
                self.error, self._failure = str(error), None
            return None

    def _hold_prepared(self, prepared: Serving | None) -> None:
        """Have ``prepared`` ready instead of what was; not while the crew is switching to that."""
        held = self._held
        if prepared is held.prepared:
            return
        with self._crew.locked():
            if held.prepared is not None and held.prepared.key == self._post.key:
                return  # it serves already: the next look adopts it
            if prepared and held.serving and prepared.key == held.serving.key:
                self._held = Held(prepared)  # what serves, made whole
            else:
                self._held = Held(held.serving, prepared)
            self._report()

    def _switch(self) -> None:
        """Have the crew serve what this worker has prepared, if all of it has."""
        prepared = self._held.prepared
        if prepared is None:
            self._waiting_since = None
            return
        missing = self._post.switch(prepared.release)
        if not missing:
            return
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        reasons = [f"worker {each.pid}: {each.error or 'not prepared yet'}" for each in missing]
        text = f"generation {prepared.release.generation} waits for {'; '.join(reasons)}"
        if now - self._waiting_since > WAITING_S and self.error != text:
            log.warning("%s: %s", self.ref.name, text)
            self.error = text

    def _adopt(self) -> None:
        """Note that the crew has switched to what this worker had prepared."""
        before, fresh = self._held.serving, self._held.prepared
        if fresh is None or fresh.key != self._post.key:
            return
        self._held = Held(fresh)
        self._waiting_since = None
        if fresh.whole:
            self.error = self._failure = None
        left = before.champion if before else None
        self._on_swap(self.ref.name, left, fresh.champion)
        log.info(
            "serving %s version %d on %s by %s (before: %s)%s",
            self.ref.name,
            fresh.champion.version,
            fresh.champion.device,
            fresh.champion.plan,
            left.version if left else "none",
            f"; on trial: {fresh.trial}" if fresh.trial else "",
        )

    def _let_go(self) -> None:
        """Forget the versions that have not served for long, or before others, and their memory."""
        held = [each for each in (self._held.serving, self._held.prepared) if each]
        used = {
            (each.version, each.manifest_sha256)
            for serving in held
            for each in (serving.champion, serving.challenger)
            if each
        }
        now = time.monotonic()
        for key in used:
            self._left_at.pop(key, None)
        for key in self._loaded.keys() - used:
            self._left_at.setdefault(key, now)
        for place, (key, left) in enumerate(sorted(self._left_at.items(), key=lambda row: -row[1])):
            if place >= MOST_WARM or now - left >= self._keep_warm_s:
                del self._loaded[key], self._left_at[key]
                give_back()

    def _forget_lost(self) -> None:
        """Have the version that serves loaded again if its device was lost."""
        serving = self._held.serving
        if serving is None:
            return
        for served in filter(None, (serving.champion, serving.challenger)):
            served.classifier.check()
        if serving.champion.classifier.lost:
            log.error("%s: %s was lost; loading again", self.ref.name, serving.champion.device)
            self._loaded.clear()
            self._left_at.clear()
            self._held = Held()
        elif serving.challenger and serving.challenger.classifier.lost:
            log.error("%s: the challenger's device was lost; loading again", self.ref.name)
            self._held = replace(self._held, serving=replace(serving, challenger=None))

    def _choose(self, release: Release) -> ReleasedVersion:
        """The released version that this slot was asked to serve."""
        released = release.find(self.ref)
        if released is None:
            raise BundleInvalid(f"the release holds no {self.ref}; waiting for the puller")
        return released

    def _report(self) -> None:
        serving, prepared = self._held.serving, self._held.prepared
        self._crew.report(
            WorkerReport(
                pid=os.getpid(),
                model=self.ref.name,
                version=serving.champion.version if serving else None,
                generation=serving.release.generation if serving else None,
                serving_key=serving.key if serving else 0,
                prepared_key=prepared.key if prepared else 0,
                error=self.error,
                refused=self._failure.version if self._failure else None,
            )
        )

    def _note_failure(
        self,
        error: Exception,
        release: Release | None,
        version: int | None,
        pause_s: float,
    ) -> None:
        is_fault = isinstance(error, BundleInvalid)  # else a device, a disk: the version is good
        text = str(error) if is_fault else f"{type(error).__name__}: {error}"
        text = shortened(text, MAX_ERROR_CHARS)  # it goes to every probe and to the registry
        retry_at = time.monotonic() + pause_s
        self._failure = Failure(release, version if is_fault else None, pause_s, retry_at)
        if text != self.error:
            serving = f"version {self.current.version}" if self.current else "nothing"
            log.warning("%s: %s; %s serves on", self.ref.name, text, serving)
            if release is not None:
                self._on_swap(self.ref.name, self.current, None)
        self.error = text
