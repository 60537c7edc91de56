"""The state that all requests of the control plane share, and the HTTP status of each error."""

import logging
import re
import shutil
import time
from contextlib import suppress
from threading import Lock, Thread

from flask import current_app
from werkzeug.exceptions import HTTPException

from registry.auth.sessions import Sessions
from registry.auth.tokens import Tokens
from registry.canary.serving_client import read_serving_status
from registry.canary.traffic_history import TrafficHistory
from registry.canary.traffic_stats import ServingStatus
from registry.core import errors as domain
from registry.core.names import check_model_name
from registry.core.paths import Paths
from registry.model.bundle import open_bundle
from registry.model.manifest import Manifest
from registry.model.refs import ModelVersion
from registry.promotion.decision_requests import DecisionRequest
from registry.promotion.gate_runner import GateResult, GateRunner
from registry.store.audit_log import Line
from registry.store.mlflow_store import ModelStore

log = logging.getLogger(__name__)
COOKIE = "convoy"
# For errors and gate results without figures: short, because an operator may repair the cause.
RESULT_TTL_S = 60.0
STATUS: dict[type[domain.ConvoyError], int] = {
    domain.UsageError: 400,
    domain.TokenMissing: 401,
    domain.TokenInsufficient: 403,
    domain.VersionNotFound: 404,
    domain.PromotionConflict: 409,
    domain.PromotionRefused: 422,
    domain.BundleInvalid: 422,
    domain.RegistryUnavailable: 503,
    domain.ModelNotReady: 503,
    domain.TokensUnavailable: 503,
}
REPORT = re.compile(r"report/[A-Za-z0-9_.-]{1,80}\.png")
MAX_REPORTS = 20


class ControlState:
    """The state that all requests of the control plane share.

    It has many attributes because each thing that must outlive a request is one of them.
    """

    def __init__(self, store: ModelStore, paths: Paths, services: tuple[str, ...]) -> None:
        self.store = store
        self.paths = paths
        self.services = services
        self.tokens = Tokens(paths.tokens)
        self.sessions = Sessions(paths.sessions)
        self.gate_runner = GateRunner(store, paths)
        self.history = TrafficHistory(self.serving_status)
        self._running_gates: dict[tuple[str, int], Thread] = {}
        self._recent: dict[tuple[str, int], tuple[float, GateResult | Exception]] = {}
        self._lock = Lock()
        self._fetching = Lock()

    def gate_result(self, name: str, version: int) -> GateResult | None:
        """The gate result of a version; None while the gate runs. The first call starts the gate.

        Raises:
            Exception: the gate failed less than a minute ago; this is its error.
        """
        champion, challenger = self.store.champion_and_candidate(name, version)
        if known := self.gate_runner.known(champion, challenger):
            return known
        with self._lock:
            at, result = self._recent.get((name, version), (-RESULT_TTL_S, None))
            if time.monotonic() - at < RESULT_TTL_S:
                if isinstance(result, Exception):
                    raise result
                if result and result.champion == (champion.version if champion else None):
                    return result
            running = self._running_gates.get((name, version))
            if running is None or not running.is_alive():
                sides = (champion, challenger)
                thread = Thread(target=self._run_gate, args=sides, name="gate", daemon=True)
                self._running_gates[name, version] = thread
                thread.start()
        return None

    def carry_out(self, decision: DecisionRequest, name: str, by: str) -> Line:
        """Carry out ``decision`` for the model ``name``; return its line in the audit log.

        Raises:
            ConvoyError: as the functions in ``registry.promotion.promotion`` do.
        """
        return decision.carry_out(self.store, self.gate_runner, check_model_name(name), by)

    def serving_status(self, name: str) -> ServingStatus:
        """How the services serve the model ``name``.

        Raises:
            ModelNotReady: a service cannot be reached, or does not serve the model.
        """
        return read_serving_status(self.services, name)

    def picture(self, version: ModelVersion, path: str) -> bytes | None:
        """A picture of the version's training report; None if the report does not have it.

        The first call for a version downloads all its pictures. Those of the last 20 reports stay
        on disk.
        """
        folder = self.paths.reports / version.manifest_sha256
        with self._fetching:  # a browser requests all pictures of a page at once
            with suppress(domain.BundleInvalid):
                bundle = open_bundle(folder, version.manifest_sha256)
                return bundle.read(path) if path in report_files(bundle.manifest) else None
            bundle = self.store.download(version, folder, lambda each: report_files(each.manifest))
            kept = sorted(folder.parent.iterdir(), key=lambda path: -path.stat().st_mtime)
            for old in kept[MAX_REPORTS:]:
                shutil.rmtree(old, ignore_errors=True)
            return bundle.read(path) if path in report_files(bundle.manifest) else None

    def _run_gate(self, champion: ModelVersion | None, challenger: ModelVersion) -> None:
        result: GateResult | Exception
        try:
            result = self.gate_runner.run(champion, challenger)
        except Exception as error:  # the edge of a thread; ``gate_result`` raises it again
            log.exception("the gate failed on %s version %d", challenger.name, challenger.version)
            result = error
        if isinstance(result, GateResult) and result.comparison is not None:
            return  # the gate runner has written it to disk
        now = time.monotonic()
        with self._lock:
            self._recent = {
                key: row for key, row in self._recent.items() if now - row[0] < RESULT_TTL_S
            }
            self._recent[challenger.name, challenger.version] = now, result


def report_files(manifest: Manifest) -> list[str]:
    """The pictures of a version's report that pages show."""
    return sorted(file for file in manifest.files if REPORT.fullmatch(file))


def control_state() -> ControlState:
    """The state of the application that answers the present request."""
    found: ControlState = current_app.extensions["convoy"]
    return found


def describe_error(error: Exception) -> tuple[int, str, str]:
    """Status, title and detail of an error. An unexpected error is logged; its text stays here."""
    if isinstance(error, HTTPException):
        return error.code or 500, error.name, error.description or error.name
    if isinstance(error, domain.ConvoyError) and type(error) in STATUS:
        return STATUS[type(error)], error.title(), str(error)
    log.error("unexpected error", exc_info=error)
    return 500, "internal error", "an unexpected error; the control plane's log has it"
