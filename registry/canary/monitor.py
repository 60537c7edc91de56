"""Looks how versions do where they serve, and has the ledger say what went wrong.

A version that a worker refuses is written down, and a trial that breaks the policy is ended. The
puller does this on a machine of its own; where pullers may only read, the control plane does.
"""

import contextlib
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from threading import Event

from registry.canary.guard import CanaryGuard
from registry.canary.serving_client import read_serving_status
from registry.canary.traffic_stats import refusals
from registry.core.errors import (
    BundleInvalid,
    ConvoyError,
    ModelNotReady,
    PromotionConflict,
    PromotionRefused,
    UsageError,
    VersionNotFound,
)
from registry.core.names import shortened
from registry.core.paths import Paths
from registry.model.refs import Canary, ModelRef
from registry.promotion.policy import CanaryPolicy, read_policy
from registry.promotion.promotion import note_refusal, stop_canary
from registry.store.audit_log import MAX_TEXT_CHARS
from registry.store.mlflow_store import ModelStore

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 2.0


class CanaryMonitor:
    """Asks ``services``, by their addresses, how each model is served; asks nobody if none."""

    def __init__(self, paths: Paths, services: Sequence[str], who: str) -> None:
        """``who`` looks: the ledger says "``who`` on" this machine."""
        self._paths = paths
        self._services = services
        self._by = f"{who} on {platform.node()}"
        self._guards: dict[str, CanaryGuard] = {}
        self._told: set[tuple[str, int]] = set()
        self._warned: set[tuple[str, int]] = set()
        self._unguarded: set[str] = set()

    def poll_once(self, store: ModelStore, name: str, canary: Canary | None) -> bool:
        """Whether ``canary`` of ``name`` was ended; what is refused is told.

        Raises:
            RegistryUnavailable: it cannot be told now; the next look tries again.
        """
        if not self._services:
            return False
        try:
            status = read_serving_status(self._services, name)
        except ModelNotReady as error:  # a service that starts or ends; it says so itself
            is_news = canary is not None and name not in self._unguarded
            log.log(logging.WARNING if is_news else logging.DEBUG, "%s", error)
            if canary is not None:
                self._unguarded.add(name)
            return False
        self._unguarded.discard(name)
        for number, why in refusals(status.workers).items():
            self.record_refusal(store, name, number, why)
        if canary is None:
            self._guards.pop(name, None)
            return False
        guard = self._guards.get(name)
        if guard is None or guard.canary != canary:
            guard = self._guards[name] = CanaryGuard(canary, self._policy(name), status)
        broken = guard.check(status)
        if broken is None:
            return False
        broken = shortened(broken, MAX_TEXT_CHARS)
        log.warning("%s: the trial of %s ends: %s", name, canary, broken)
        with contextlib.suppress(VersionNotFound, PromotionConflict):  # ended by others
            stop_canary(store, name, broken, expect_challenger=canary.version, by=self._by)
        self._guards.pop(name)
        return True

    def record_refusal(self, store: ModelStore, name: str, number: int, why: str) -> None:
        """Have the ledger say, once, that a version is refused where this looks.

        Raises:
            RegistryUnavailable: it cannot be told now; the next call tries again.
        """
        if (name, number) in self._told:
            return
        try:
            note_refusal(store, store.resolve(ModelRef(name, number)), why, self._by)
        except PromotionRefused as error:  # the log is not followed now; `why` is what matters
            if (name, number) not in self._warned:
                log.warning("version %d of %s is refused here (%s): %s", number, name, why, error)
            self._warned.add((name, number))
            return
        except (VersionNotFound, BundleInvalid):  # deleted since
            pass
        self._told.add((name, number))

    def watch(self, open_store: Callable[[], ModelStore], stop: Event) -> None:
        """Look at every model of the registry, again and again, until ``stop`` is set."""
        store: ModelStore | None = None
        failing: set[str] = set()
        while not stop.wait(POLL_INTERVAL_S):
            with self._noted("", failing):
                store = store or open_store()
                for name in store.models():
                    with self._noted(name, failing):  # one model's failure leaves no other alone
                        _, canary = store.aliases_and_canary(name)
                        self.poll_once(store, name, canary)
            if "" in failing:
                store = None

    @contextlib.contextmanager
    def _noted(self, name: str, failing: set[str]) -> Iterator[None]:
        """The edge of a thread: what fails in the block is logged once, and the next look comes."""
        try:
            yield
            failing.discard(name)
        except Exception as error:
            unexpected = not isinstance(error, ConvoyError | OSError)
            if unexpected or name not in failing:
                what = f"{name}: a trial is" if name else "trials are"
                log.warning("%s not guarded: %s", what, error, exc_info=unexpected)
            failing.add(name)

    def _policy(self, name: str) -> CanaryPolicy:
        """The policy of trials; one that cannot be used must not leave a trial unguarded."""
        try:
            return read_policy(self._paths.policy(name)).canary
        except UsageError as error:
            log.warning("%s; trials are guarded by the default", error)
            return CanaryPolicy()
