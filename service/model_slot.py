"""``ModelSlot``: where the serving version of one model lives, and how the next one takes over.

A whole ``ServedModel`` is built beside the old one, warmed up and proved on its golden images, and
then one reference is swapped. Requests that hold the old object finish on it.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Lock, Thread

from msgspec import Struct

from registry.bundle import Bundle, open_bundle
from registry.classifier import Classifier
from registry.contract import Manifest, ModelRef
from registry.errors import BundleInvalid, ModelNotReady, PlanUndecided
from registry.releases import (
    PullStatus,
    Release,
    ReleasedVersion,
    read_release,
    read_status,
    version_folder,
)
from service.batcher import MicroBatcher

log = logging.getLogger(__name__)

POLL_S = 0.25
RETRY_S = 5.0
# Finding out anew that no plan can serve a version takes the cores from the one that serves.
MOST_RETRY_S = 300.0
REQUEST_WAITS_S = 1.0


class ServedModel(Struct, frozen=True, kw_only=True):
    """One version, loaded, warmed up and proved. Immutable, shared by all threads."""

    manifest: Manifest
    manifest_sha256: str
    version: int
    alias: str | None
    classifier: Classifier
    batcher: MicroBatcher

    @property
    def name(self) -> str:
        return self.manifest.model

    @property
    def device(self) -> str:
        return self.classifier.device

    @property
    def plan(self) -> str:
        return self.classifier.plan


OnSwap = Callable[[str, ServedModel | None, ServedModel | None], None]
"""Told the model's name, what served before, and what serves now (None: it was refused)."""

Load = Callable[[Bundle, ReleasedVersion], ServedModel]
"""Loads a version; raises ``PlanUndecided`` rather than spend the time that choosing one takes."""

Decide = Callable[[Bundle], object]
"""Chooses the plan of a version, however long it takes, so that it can be loaded."""


class ModelSlot:
    """Follows ``release.json`` of one model."""

    def __init__(
        self,
        ref: ModelRef,
        models_folder: Path,
        load: Load,
        decide: Decide = lambda bundle: None,
        on_swap: OnSwap = lambda name, before, after: None,
    ) -> None:
        self.ref = ref
        self._served: ServedModel | None = None
        self.error: str | None = None
        self._models_folder = models_folder
        self._load = load
        self._decide = decide
        self._on_swap = on_swap
        self._refreshing = Lock()
        self._loaded: tuple[ReleasedVersion, ...] | None = None
        self._failed: tuple[ReleasedVersion, ...] | None = None
        self._retry_at = 0.0
        self._pause_s = RETRY_S
        self._undecided: tuple[Release, Bundle] | None = None

    @property
    def current(self) -> ServedModel | None:
        """What serves; None when nothing was loaded yet, or its device was lost since."""
        served = self._served
        return None if served is None or served.classifier.lost else served

    def require(self) -> ServedModel:
        """The serving version, read once per request.

        A worker that has none yet loads what is released now, so that no request fails in the
        moment in which another worker is ready already and this one is not. That takes a second, or
        many on a GPU: it is not for a thread that others wait for.

        Raises:
            ModelNotReady: there is none to load, its plan is still being chosen, or its device was
                lost.
        """
        if self._served is None:
            self._look(REQUEST_WAITS_S)
        served = self.current
        if served is None:
            raise ModelNotReady(f"{self.ref.name}: {self.error or 'its device was lost'}")
        return served

    def pull_status(self) -> PullStatus:
        return read_status(self._models_folder, self.ref.name)

    def refresh(self) -> bool:
        """Load what is released if it is not what serves; whether a swap happened.

        If its plan was never chosen on this machine, that is done first, while the old version
        serves on. A failure keeps the old version, is logged once, and stands in ``error`` until it
        is mended.
        """
        swapped = self._look()
        undecided = self._undecided
        if undecided is None:
            return swapped
        release, bundle = undecided
        try:
            self._decide(bundle)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: the old version serves on
            again = release.versions == self._failed
            pause_s = min(2 * self._pause_s, MOST_RETRY_S) if again else RETRY_S
            self._note_failure(error, release, pause_s)
            return False
        swapped = self._look()
        if self._undecided is not None:
            damaged = BundleInvalid("the plan that was just chosen cannot be loaded")
            self._note_failure(damaged, release, RETRY_S)
        return swapped

    def _look(self, patience_s: float = -1) -> bool:
        """``refresh`` without choosing a plan; not at all if others look for ``patience_s`` yet."""
        if not self._refreshing.acquire(timeout=patience_s):
            return False
        try:
            return self._refresh()
        finally:
            self._refreshing.release()

    def _refresh(self) -> bool:
        release: Release | None = None
        self._undecided = None
        self._forget_lost()
        try:
            release = read_release(self._models_folder, self.ref.name)
            if release is None:
                raise BundleInvalid(f"nothing is released; run: python -m registry pull {self.ref}")
            if release.versions == self._loaded:
                self._failed, self.error = None, None
                return False
            if release.versions == self._failed and time.monotonic() < self._retry_at:
                return False
            wanted = self._choose(release)
            folder = version_folder(self._models_folder, self.ref.name, wanted.version)
            bundle = open_bundle(folder, wanted.manifest_sha256)
            try:
                fresh = self._load(bundle, wanted)
            except PlanUndecided as error:
                self._undecided = release, bundle
                if release.versions != self._failed:
                    self.error = str(error)
                return False
        except Exception as error:  # noqa: BLE001 - the edge of a thread: the old version serves on
            self._note_failure(error, release, RETRY_S)
            return False
        before, self._served = self._served, fresh
        self._loaded, self._failed, self.error = release.versions, None, None
        self._on_swap(self.ref.name, before, fresh)
        log.info(
            "serving %s version %d on %s by %s (before: %s)",
            fresh.name,
            fresh.version,
            fresh.device,
            fresh.plan,
            before.version if before else "none",
        )
        return True

    def watch(self, stop: Event) -> None:
        """Refresh until ``stop`` is set."""
        while True:
            self.refresh()
            if stop.wait(POLL_S):
                return

    def start(self) -> Event:
        """Load what is released, then watch from a daemon thread until the event is set.

        The first load is waited for, if its plan is known: a worker that takes no connections yet
        refuses none. Choosing a plan would take longer than a worker may to start.
        """
        self._look()
        stop = Event()
        name = f"slot-{self.ref.name}"
        Thread(target=self.watch, args=(stop,), name=name, daemon=True).start()
        return stop

    def _forget_lost(self) -> None:
        """Have the version that serves loaded again if its device was lost."""
        if self._served is None or self._loaded is None:
            return
        self._served.classifier.check()
        if self.current is None:
            log.error("%s: %s was lost; loading again", self.ref.name, self._served.device)
            self._loaded = None

    def _choose(self, release: Release) -> ReleasedVersion:
        """The released version that this slot was asked to serve."""
        released = release.find(self.ref)
        if released is None:
            raise BundleInvalid(f"the release holds no {self.ref}; waiting for the puller")
        return released

    def _note_failure(self, error: Exception, release: Release | None, pause_s: float) -> None:
        text = (
            str(error) if isinstance(error, BundleInvalid) else f"{type(error).__name__}: {error}"
        )
        self._failed = release.versions if release else None
        self._pause_s, self._retry_at = pause_s, time.monotonic() + pause_s
        if text != self.error:
            serving = f"version {self.current.version}" if self.current else "nothing"
            log.warning("%s: %s; %s serves on", self.ref.name, text, serving)
            if release is not None:
                self._on_swap(self.ref.name, self.current, None)
        self.error = text
