"""Polls the services for their traffic, ends canaries that break the policy, records refusals.

If a worker cannot serve a version, the audit log gets a line *refused*. A puller runs the monitor
on its own machine. Where pullers have only read access to the registry, the control plane runs it.
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
    """Polls ``services``, given by their addresses; without any it does nothing."""

    def __init__(self, paths: Paths, services: Sequence[str], role: str) -> None:
        """``role`` names this process in the audit log: "``role`` on HOST"."""
        self._paths = paths
        self._services = services
        self._by = f"{role} on {platform.node()}"
        self._guards: dict[str, CanaryGuard] = {}
        self._recorded: set[tuple[str, int]] = set()
        self._warned: set[tuple[str, int]] = set()
        self._unguarded: set[str] = set()

    def poll_once(self, store: ModelStore, name: str, canary: Canary | None) -> bool:
        """Record versions that workers refuse, check ``canary``; whether this call ended it.

        Raises:
            RegistryUnavailable: the registry cannot be written to now; the next poll tries again.
        """
        if not self._services:
            return False
        try:
            status = read_serving_status(self._services, name)
        except ModelNotReady as error:  # a service that starts or ends; it logs that itself
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
        log.warning("%s: ending the canary, %s: %s", name, canary, broken)
        with contextlib.suppress(VersionNotFound, PromotionConflict):  # somebody else ended it
            stop_canary(store, name, broken, expect_challenger=canary.version, by=self._by)
        self._guards.pop(name)
        return True

    def record_refusal(self, store: ModelStore, name: str, number: int, why: str) -> None:
        """Record in the audit log, once, that this machine cannot serve a version.

        Raises:
            RegistryUnavailable: the registry cannot be written to now; the next call tries again.
        """
        if (name, number) in self._recorded:
            return
        try:
            note_refusal(store, store.resolve(ModelRef(name, number)), why, self._by)
        except PromotionRefused as error:  # the audit log cannot be used now; still log `why`
            if (name, number) not in self._warned:
                log.warning(
                    "this machine cannot serve version %d of %s (%s), and the audit log cannot "
                    "record that: %s",
                    number,
                    name,
                    why,
                    error,
                )
            self._warned.add((name, number))
            return
        except (VersionNotFound, BundleInvalid):  # deleted since
            pass
        self._recorded.add((name, number))

    def watch(self, open_store: Callable[[], ModelStore], stop: Event) -> None:
        """Poll every model of the registry until ``stop`` is set."""
        store: ModelStore | None = None
        failing: set[str] = set()
        while not stop.wait(POLL_INTERVAL_S):
            with self._logged("", failing):
                store = store or open_store()
                for name in store.models():
                    with self._logged(name, failing):  # a failure must not stop the others
                        _, canary = store.aliases.read_with_canary(name)
                        self.poll_once(store, name, canary)
            if "" in failing:
                store = None

    @contextlib.contextmanager
    def _logged(self, name: str, failing: set[str]) -> Iterator[None]:
        """The edge of a thread: log a failure in the block, an expected one once, and go on."""
        try:
            yield
            failing.discard(name)
        except Exception as error:
            unexpected = not isinstance(error, ConvoyError | OSError)
            if unexpected or name not in failing:
                subject = f"{name}: its canary is" if name else "canaries are"
                log.warning("%s not guarded: %s", subject, error, exc_info=unexpected)
            failing.add(name)

    def _policy(self, name: str) -> CanaryPolicy:
        """The canary policy; the default if the file cannot be used: a canary needs a guard."""
        try:
            return read_policy(self._paths.policy(name)).canary
        except UsageError as error:
            log.warning("%s; canaries are guarded by the default policy", error)
            return CanaryPolicy()
