"""The texts that ``convoy`` prints: versions, decisions, plans, traffic.

Texts from the registry and from services are untrusted: each stays on its own line, with its
control characters escaped.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from registry.canary.traffic_stats import UNBOUNDED_S, ServingStatus, VersionTraffic
from registry.core.names import one_line
from registry.model.manifest import LaterEvaluation, Manifest
from registry.model.refs import ForeignVersion, ModelVersion

if TYPE_CHECKING:
    from registry.model.plans.planner import PlanSelection
    from registry.store.audit_log import Line

BAR = 24  # characters


def versions_table(rows: Iterable[tuple[ModelVersion, Mapping[str, str]]]) -> str:
    """A table with a line for each version, from its tags."""
    heading = f"{'model':<20} {'version':>7}  {'aliases':<22} {'validation':>10} {'test':>8}"
    lines = [f"{heading}  recipe    made"]
    lines += [
        f"{version.name:<20} {version.version:>7}  {', '.join(version.aliases):<22} "
        f"{_rounded(tags.get('convoy.validation_accuracy')):>10} "
        f"{_rounded(tags.get('convoy.test_accuracy')):>8}  {tags.get('convoy.recipe', ''):<8}  "
        f"{_when(version)}"
        for version, tags in rows
    ]
    return _page(lines)


def foreign_table(versions: Iterable[ForeignVersion]) -> str:
    """Versions that MLflow logged without Convoy, each with the command that imports it."""
    lines = ["not published by Convoy, which serves them once they are imported:"]
    for each in versions:
        flavours = ", ".join(each.flavours) or each.why
        lines += [f"{each.name:<20} {each.version:>7}  {flavours}", f"{'':<30}{each.advice}"]
    return _page(lines)


def version_page(
    version: ModelVersion,
    manifest: Manifest,
    evaluation: LaterEvaluation | None,
    decisions: Sequence["Line"],
) -> str:
    """One version: its origin, input and metrics, and the decisions about its model."""
    preprocess, data, source = manifest.preprocess, manifest.data, manifest.source
    counts = ", ".join(f"{count:,} {split}" for split, count in data.counts.items())
    lines = [
        f"{version.name} version {version.version} ({', '.join(version.aliases) or 'no alias'})",
        f"  made       {_when(version)}, run {version.run_id}",
        f"  network    {manifest.network}",
        f"  labels     {', '.join(manifest.labels)}",
        f"  input      {preprocess.mode} {preprocess.width_px}×{preprocess.height_px}",
        f"  data       {data.name}: {counts}; sha256 {data.sha256[:12]}…",
        f"  source     {source.recipe}, seed {source.seed}, {source.device}, "
        f"commit {source.git_commit}",
        *_imported(manifest),
        *(f"  {name:<28} {value:.4f}" for name, value in manifest.metrics.items()),
        *_evaluated(evaluation),
        *(f"  {decision(line)}" for line in decisions),
    ]
    return _page(lines)


def _imported(manifest: Manifest) -> list[str]:
    """Where an imported version comes from, and what proves its answers."""
    if (record := manifest.imported) is None:
        return []
    proof = "not compared with answers from there"
    if record.compared:
        proof = f"{record.compared:,} answers from there are equal"
        if record.largest_difference is not None:
            proof += f" to {record.largest_difference:.2g}"
    return [f"  imported   {record.origin}, sha256 {record.sha256[:12]}…; {proof}"]


def _evaluated(evaluation: LaterEvaluation | None) -> list[str]:
    """What the version scored on pictures that came after it was published."""
    if evaluation is None:
        return []
    count = sum(evaluation.data.counts.values())
    accuracy = evaluation.metrics["validation_accuracy"]
    return [f"  evaluated  {evaluation.data.name}: {count:,} pictures, accuracy {accuracy:.4f}"]


def _rounded(tag: str | None) -> str:
    """A share from a tag, with four places; the tag itself if it is not a number."""
    try:
        return f"{float(tag):.4f}" if tag else ""
    except ValueError:  # anyone may set a tag in MLflow
        return tag or ""


def decision(line: "Line") -> str:
    """One line of the audit log as text."""
    entry = line.entry
    overtaken = "" if line.stands else ", overtaken"
    return one_line(
        f"{line.number:>4}  {entry.at}  {entry.by}  {entry.action} version {entry.to_version} "
        f"(champion was {entry.from_version or 'none'}){overtaken}: "
        f"{'; '.join(filter(None, (entry.reason, entry.details))) or 'no reason given'}"
    )


def plans_table(selection: "PlanSelection", manifest: Manifest) -> str:
    """Each benchmarked plan, fastest first: times, memory, accuracy, result."""
    from registry.model.plans.base import find_plan
    from registry.model.plans.planner import score

    lines = [
        f"{'plan':<18} {'ms at 1':>9} {'at 8':>9} {'at 32':>9} {'memory MB':>10} "
        f"{'difference':>10} {'held-out':>8}  result"
    ]
    for each in sorted(selection.results, key=lambda result: score(result.batch_ms)):
        accuracy = manifest.plan_accuracy.get(each.plan)
        if each.reason is None and find_plan(each.plan).precision == "fp32":
            accuracy = manifest.metrics.get("validation_accuracy")
        cells = [
            *(_cell(each.batch_ms.get(size), 9, ".3f") for size in (1, 8, 32)),
            _cell(each.peak_mb, 10, ".0f"),
            _cell(each.max_difference, 10, ".2g"),
            _cell(accuracy, 8, ".4f"),
        ]
        details = "chosen" if each.plan == selection.chosen else each.reason or "accepted"
        lines.append(f"{each.plan:<18} {' '.join(cells)}  {details}")
    return _page(lines)


def traffic_page(status: ServingStatus) -> str:
    """A column for each version that serves, bars of its times, and a line for each worker."""
    serving = [number for number in (status.champion, status.challenger) if number is not None]
    shown = [status.of(number) for number in serving]
    names = ["champion", "challenger"][: len(serving)]
    rows: list[tuple[str, ...]] = [
        ("", *(f"{name} {number}" for name, number in zip(names, serving, strict=True))),
        ("requests", *(f"{each.requests:,}" for each in shown)),
        ("errors", *(f"{each.errors:,} ({each.error_rate:.2%})" for each in shown)),
        ("p50 ms", *(_ms(each.quantile_s(0.5)) for each in shown)),
        ("p99 ms", *(_ms(each.quantile_s(0.99)) for each in shown)),
        ("mean confidence", *(_cell(each.mean_confidence, 0, ".4f") for each in shown)),
        ("agreement in the shadow", *(_cell(each.agreement, 0, ".4f") for each in shown)),
        ("shadowed / dropped", *(f"{each.shadowed:,} / {each.dropped:,}" for each in shown)),
    ]
    lines = [f"{row[0]:<24}" + "".join(f"{cell:>22}" for cell in row[1:]) for row in rows]
    for name, each in zip(names, shown, strict=True):
        lines += [f"response times of the {name}", *_bars(each)]
    for worker in status.workers:
        lines.append(
            f"worker {worker.pid}: version {worker.version}, generation {worker.generation}"
            + (f", {worker.error}" if worker.error else "")
        )
    return _page(lines)


def _page(lines: Iterable[str]) -> str:
    return "\n".join(map(one_line, lines))


def _bars(version: VersionTraffic) -> list[str]:
    most = max((count for _, count in version.buckets), default=0)
    return [
        f"  {'over' if upper >= UNBOUNDED_S else f'≤ {1000 * upper:g}':>7} ms "
        f"{'█' * max(1, round(BAR * count / most)):<{BAR}} {count:,}"
        for upper, count in version.buckets
        if count
    ]


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.3g}"


def _cell(value: float | None, width: int, form: str) -> str:
    return "–".rjust(width) if value is None else f"{value:>{width}{form}}"


def _when(version: ModelVersion) -> str:
    return datetime.fromtimestamp(version.created_unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
