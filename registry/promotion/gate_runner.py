"""Runs the gate on two versions of a registry: downloads them, times them and compares them.

``registry.promotion.gate`` does the comparison itself. A gate result is cached for an hour, so an
operator who reads it and then promotes gets the same result.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from threading import Lock

import msgspec
from msgspec import Struct

from registry.core.devices import serving_threads
from registry.core.errors import BundleInvalid, PromotionRefused
from registry.core.files import write_atomically
from registry.core.names import one_line, sha256_hex
from registry.core.paths import Paths
from registry.model.bundle import CHAMPION_SCORES, HELDOUT, THUMBNAILS, TRAINING, Bundle
from registry.model.image.decode import encode_png
from registry.model.refs import ForeignVersion, ModelVersion
from registry.promotion.gate import GateComparison, compare
from registry.promotion.latency_comparison import compare_latency
from registry.promotion.pairing import Pairs, pair_heldout
from registry.promotion.policy import Policy, read_policy
from registry.store.mlflow_store import ModelStore

log = logging.getLogger(__name__)

GATE_RESULT_TTL_S = 3600.0
MAX_SHOWN_CHANGES = 60  # for gained and for lost pictures each


class PredictionChange(Struct, frozen=True, kw_only=True):
    """A held-out picture that only one of the two gets right.

    ``position`` is its place among the challenger's held-out pictures. ``champion`` and
    ``challenger`` are the answers: a label and its probability. ``picture`` is a PNG of at most
    64 px, or None if the bundle has none.
    """

    position: int
    gained: bool
    truth: str
    champion: tuple[str, float]
    challenger: tuple[str, float]
    picture: bytes | None = None


class GateResult(Struct, frozen=True, kw_only=True):
    """Whether the gate accepts a challenger, and why.

    ``accepted`` assumes that the operator does not allow new classes. ``comparison`` is None if the
    two could not be compared or there was no champion; ``summary`` says which.
    """

    model: str
    champion: int | None
    challenger: int
    accepted: bool
    summary: str
    comparison: GateComparison | None = None
    prediction_changes: tuple[PredictionChange, ...] = ()
    evaluated_unix_s: float

    def accepts(self, *, allow_new_classes: bool) -> bool:
        """Whether the challenger may be promoted; ``allow_new_classes`` lets classes differ."""
        return self.accepted or (
            allow_new_classes and self.comparison is not None and self.comparison.passed
        )

    def table(self, *, allow_new_classes: bool = False) -> str:
        """The gate result for a terminal: a line for each check."""
        accepted = self.accepts(allow_new_classes=allow_new_classes)
        lines = [
            f"{self.model}: challenger {self.challenger}, champion {self.champion or 'none'}: "
            + ("accepted" if accepted else "REFUSED")
        ]
        if self.comparison is None:
            return "\n".join(map(one_line, [*lines, f"  {self.summary}"]))
        lines.append(f"  {'':<22} {'champion':>10} {'challenger':>10}")
        lines += [
            f"  {check.what:<22} {check.champion:>10.4g} {check.challenger:>10.4g}  "
            f"{'ok' if check.passed else 'NO'}, allowed: {check.allowed}"
            + (f" ({check.note})" if check.note else "")
            for check in self.comparison.checks
        ]
        if self.comparison.class_changes:
            allowed = "allowed" if allow_new_classes else "NO, unless --allow-new-classes"
            lines.append(f"  the classes differ: {allowed}. Clients will see:")
            lines += [f"    {change}" for change in self.comparison.class_changes]
        lines.append(
            f"  {self.comparison.examples:,} held-out pictures: {len(self.comparison.gained)} "
            f"gained, {len(self.comparison.lost)} lost, "
            f"McNemar p = {self.comparison.p_value:.3g}"
        )
        lines += [f"  {note}" for note in self.comparison.notes]
        return "\n".join(map(one_line, lines))


class GateRunner:
    """Runs the gate for the versions of one registry, with the policies in one home folder."""

    def __init__(
        self,
        store: ModelStore,
        paths: Paths,
        environment: Mapping[str, str] = os.environ,
        *,
        timed: bool = True,
    ) -> None:
        """``timed``: also time forward passes. It takes seconds, and a minute the first time."""
        self._store = store
        self._paths = paths
        self._device = environment.get("CONVOY_DEVICE") or "auto"
        self._plan = environment.get("CONVOY_PLAN") or "auto"
        self._threads = serving_threads(environment)
        self._timed = timed
        self._one = Lock()  # concurrent runs would disturb each other's timings

    def run(
        self, champion: ModelVersion | ForeignVersion | None, challenger: ModelVersion
    ) -> GateResult:
        """The gate result for ``challenger``. A version that cannot be read or compared is refused.

        Raises:
            RegistryUnavailable: the bundles cannot be fetched.
            UsageError: the policy cannot be used.
        """
        if isinstance(champion, ForeignVersion):
            return _foreign_champion(champion, challenger)
        policy = read_policy(self._paths.policy(challenger.name))
        with self._one, tempfile.TemporaryDirectory(prefix="convoy-gate-") as folder:
            if known := self.known(champion, challenger, policy):
                return known
            result = self._compare_versions(champion, challenger, policy, Path(folder))
        if result.comparison is not None:  # do not cache failures: an operator may fix them soon
            file = self._file(champion, challenger, policy)
            try:
                write_atomically(file, msgspec.json.encode(result))
                _remove_old(file.parent)
            except OSError as error:
                log.warning("cannot cache the gate result: %s", error)
        return result

    def known(
        self,
        champion: ModelVersion | ForeignVersion | None,
        challenger: ModelVersion,
        policy: Policy | None = None,
    ) -> GateResult | None:
        """The gate result, if it is less than an hour old or needs no comparison; else None."""
        if isinstance(champion, ForeignVersion):
            return _foreign_champion(champion, challenger)
        policy = policy or read_policy(self._paths.policy(challenger.name))
        try:
            data = self._file(champion, challenger, policy).read_bytes()
            result = msgspec.json.decode(data, type=GateResult)
        except (OSError, msgspec.MsgspecError, ValueError):
            return None
        return result if 0 <= time.time() - result.evaluated_unix_s < GATE_RESULT_TTL_S else None

    def _file(
        self, champion: ModelVersion | None, challenger: ModelVersion, policy: Policy
    ) -> Path:
        sides = [
            (each.version, each.manifest_sha256, each.evaluation_sha256)
            for each in (champion, challenger)
            if each
        ]
        how = (self._timed, self._device, self._plan, self._threads)
        facts = (challenger.name, sides, policy, how)
        return self._paths.gate_results / f"{sha256_hex(msgspec.json.encode(facts))[:32]}.json"

    def _compare_versions(
        self,
        champion: ModelVersion | None,
        challenger: ModelVersion,
        policy: Policy,
        folder: Path,
    ) -> GateResult:
        result = GateResult(
            model=challenger.name,
            champion=champion.version if champion else None,
            challenger=challenger.version,
            accepted=False,
            summary="",
            evaluated_unix_s=time.time(),
        )
        try:
            place = folder / "challenger"
            new = download_evaluated(self._store, challenger, place, _needed_of_challenger)
            if champion is None:
                return msgspec.structs.replace(
                    result, accepted=True, summary="there was no champion to compare with"
                )
            old = download_evaluated(self._store, champion, folder / "champion", _needed)
            # First, because it may refuse before the slow steps.
            pairs = pair_heldout(old, new, policy.min_examples)
            timed = None
            if self._timed:
                timed = compare_latency(
                    old, new, self._paths.plans, self._device, self._plan, self._threads
                )
            comparison = compare(old, new, policy, timed, pairs)
        except (PromotionRefused, BundleInvalid) as error:
            return msgspec.structs.replace(result, summary=str(error))
        return msgspec.structs.replace(
            result,
            accepted=comparison.accepted,
            summary=str(comparison),
            comparison=comparison,
            prediction_changes=_prediction_changes(comparison, pairs, old, new),
        )


def download_evaluated(
    store: ModelStore,
    version: ModelVersion,
    folder: Path,
    wanted: Callable[[Bundle], Iterable[str]],
) -> Bundle:
    """As ``ModelStore.download``, with the record of the later evaluation, if there is one."""
    evaluation = store.evaluations.fetch(version, folder)
    if evaluation is None:
        return store.download(version, folder, wanted)
    replaced = set(evaluation.files)
    bundle = store.download(
        version, folder, lambda each: [name for name in wanted(each) if name not in replaced]
    )
    return bundle.with_evaluation(evaluation)


def _needed(bundle: Bundle) -> list[str]:
    """The files that the comparison reads, and those that serving needs.

    An imported version may lack records of its examples.
    """
    records = [HELDOUT, TRAINING]
    if bundle.manifest.imported:
        records = [name for name in records if name in bundle.manifest.files]
    return [*records, *bundle.serving_files()]


def _needed_of_challenger(bundle: Bundle) -> list[str]:
    """As ``_needed``, with the champion's scores on its pictures, and small copies of these."""
    optional = (name for name in (CHAMPION_SCORES, THUMBNAILS) if name in bundle.manifest.files)
    return [*_needed(bundle), *optional]


def _foreign_champion(champion: ForeignVersion, challenger: ModelVersion) -> GateResult:
    """The refusal when Convoy did not publish the champion: there is nothing to compare with."""
    return GateResult(
        model=challenger.name,
        champion=champion.version,
        challenger=challenger.version,
        accepted=False,
        summary=f"the two cannot be compared: {champion.why}. Roll back to a version that Convoy "
        "published, or use --force with a reason",
        evaluated_unix_s=time.time(),
    )


def _prediction_changes(
    comparison: GateComparison, pairs: Pairs, champion: Bundle, challenger: Bundle
) -> tuple[PredictionChange, ...]:
    """At most ``MAX_SHOWN_CHANGES`` of each kind, most confident mistakes first."""
    sides = (
        (pairs.champion, champion.manifest.labels),
        (pairs.challenger, challenger.manifest.labels),
    )
    rows = {int(position): row for row, position in enumerate(pairs.positions)}
    pictures = challenger.thumbnails()
    prediction_changes = []
    for positions, gained in ((comparison.lost, False), (comparison.gained, True)):
        wrong = (pairs.champion if gained else pairs.challenger).probabilities
        surest = sorted(positions, key=lambda each: -float(wrong[rows[each]].max()))
        for position in surest[:MAX_SHOWN_CHANGES]:
            row = rows[position]
            answers = [
                (
                    labels[int(side.probabilities[row].argmax())],
                    float(side.probabilities[row].max()),
                )
                for side, labels in sides
            ]
            prediction_changes.append(
                PredictionChange(
                    position=position,
                    gained=gained,
                    truth=challenger.manifest.labels[int(pairs.challenger.labels[row])],
                    champion=answers[0],
                    challenger=answers[1],
                    picture=encode_png(pictures[position]) if position < len(pictures) else None,
                )
            )
    return tuple(prediction_changes)


def _remove_old(folder: Path) -> None:
    for file in folder.glob("*.json"):
        if time.time() - file.stat().st_mtime > GATE_RESULT_TTL_S:
            file.unlink(missing_ok=True)
