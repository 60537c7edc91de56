"""What the control plane's requests work on, and how an error becomes an answer."""

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
from registry.canary.serving_client import read_live
from registry.canary.traffic_stats import Live
from registry.control.charts import LiveHistory
from registry.core import errors as domain
from registry.core.names import check_model_name
from registry.core.paths import Home
from registry.model.bundle import open_bundle
from registry.model.manifest import Manifest
from registry.model.refs import ModelVersion
from registry.promotion.commands import Decision
from registry.promotion.gate_runner import Judge, Judgement
from registry.store.audit_log import Line
from registry.store.mlflow_store import ModelStore

log = logging.getLogger(__name__)
COOKIE = "convoy"
SAID_S = 60.0  # a judgement without figures is not kept on disk: what is wrong may be mended
STATUS: dict[type[domain.ConvoyError], int] = {
    domain.UsageError: 400,
    domain.KeyMissing: 401,
    domain.KeyInsufficient: 403,
    domain.VersionNotFound: 404,
    domain.PromotionConflict: 409,
    domain.PromotionRefused: 422,
    domain.BundleInvalid: 422,
    domain.RegistryUnavailable: 503,
    domain.ModelNotReady: 503,
    domain.KeysUnavailable: 503,
}
REPORT = re.compile(r"report/[A-Za-z0-9_.-]{1,80}\.png")
REPORTS_KEPT = 20


class Control:
    """What the control plane's requests work on."""

    def __init__(self, store: ModelStore, home: Home, services: tuple[str, ...]) -> None:
        self.store = store
        self.home = home
        self.services = services
        self.tokens = Tokens(home.tokens)
        self.sessions = Sessions(home.sessions)
        self.judge = Judge(store, home)
        self.history = LiveHistory(self.live)
        self._judging: dict[tuple[str, int], Thread] = {}
        self._said: dict[tuple[str, int], tuple[float, Judgement | Exception]] = {}
        self._lock = Lock()
        self._fetching = Lock()

    def judgement(self, name: str, version: int) -> Judgement | None:
        """The gate's word on a version; None while it is being found, which this begins.

        Raises:
            ConvoyError: why it was not found, of the last minute.
        """
        champion, challenger = self.store.sides(name, version)
        if known := self.judge.known(champion, challenger):
            return known
        with self._lock:
            at, said = self._said.get((name, version), (-SAID_S, None))
            if time.monotonic() - at < SAID_S:
                if isinstance(said, Exception):
                    raise said
                if said and said.champion == (champion.version if champion else None):
                    return said
            running = self._judging.get((name, version))
            if running is None or not running.is_alive():
                sides = (champion, challenger)
                thread = Thread(target=self._judge, args=sides, name="judge", daemon=True)
                self._judging[name, version] = thread
                thread.start()
        return None

    def carry_out(self, decision: Decision, name: str, by: str) -> Line:
        """The ledger's line of ``decision`` about the model ``name``; raises as promotions do."""
        return decision.carry_out(self.store, self.judge, check_model_name(name), by)

    def live(self, name: str) -> Live:
        """How the services serve ``name``; raises ``ModelNotReady`` when they do not say."""
        return read_live(self.services, name)

    def picture(self, version: ModelVersion, path: str) -> bytes | None:
        """A picture of the version's report, all of which are fetched once and kept."""
        folder = self.home.reports / version.manifest_sha256
        with self._fetching:  # a page asks for all its pictures at once
            with suppress(domain.BundleInvalid):
                bundle = open_bundle(folder, version.manifest_sha256)
                return bundle.read(path) if path in report_files(bundle.manifest) else None
            bundle = self.store.download(version, folder, lambda each: report_files(each.manifest))
            kept = sorted(folder.parent.iterdir(), key=lambda path: -path.stat().st_mtime)
            for old in kept[REPORTS_KEPT:]:
                shutil.rmtree(old, ignore_errors=True)
            return bundle.read(path) if path in report_files(bundle.manifest) else None

    def _judge(self, champion: ModelVersion | None, challenger: ModelVersion) -> None:
        said: Judgement | Exception
        try:
            said = self.judge.judge(champion, challenger)
        except Exception as error:  # the edge of a thread; who asks again is told
            log.exception("%s version %d was not judged", challenger.name, challenger.version)
            said = error
        if isinstance(said, Judgement) and said.verdict is not None:
            return  # it lies on disk
        now = time.monotonic()
        with self._lock:
            self._said = {key: row for key, row in self._said.items() if now - row[0] < SAID_S}
            self._said[challenger.name, challenger.version] = now, said


def report_files(manifest: Manifest) -> list[str]:
    """The pictures of a version's report that pages show."""
    return sorted(file for file in manifest.files if REPORT.fullmatch(file))


def control() -> Control:
    found: Control = current_app.extensions["convoy"]
    return found


def describe_error(error: Exception) -> tuple[int, str, str]:
    """Status, title and detail of an error; what nobody foresaw is logged, and told nobody."""
    if isinstance(error, HTTPException):
        return error.code or 500, error.name, error.description or error.name
    if isinstance(error, domain.ConvoyError) and type(error) in STATUS:
        return STATUS[type(error)], error.title(), str(error)
    log.error("unexpected error", exc_info=error)
    return 500, "internal error", "something went wrong on our side; the log says what"
