"""Writes the results of ``benchmarks.serving``: the table, the promises with figures, the plot.

A row with failures is marked and used in no ratio: a promise that needs it is not measured.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.closed_loop import Figures, explain, failures

Rows = dict[str, dict[str, Figures]]
"""By server, by number of connections."""


def conclude(results: dict[str, Rows], details: dict[str, Any], file: Path | None) -> int:
    """Print the table and write all results to ``file`` and next to it.

    Args:
        results: the rows of each workload.
        details: the other results of each workload, and ``where``.
        file: the JSON file; None writes nothing.

    Returns:
        The exit status: 1 if a row is marked.
    """
    lines: list[str] = []
    bad: dict[str, str] = {}
    for name, rows in results.items():
        found = details[name]
        title = f"{name.upper()}: {found['model']}, plan {found['plan']}"
        lines += [*describe(title, rows, promises(name, rows, found)), stages_line(found), ""]
        every = rows | {"many in a request": {"8": found["many in a request"]}}
        bad |= {f"{name}: {row}": what for row, what in marked(every).items()}
    table = "\n".join(lines)
    print(table)
    if file:
        write(file, results, details, table)
    for row, what in bad.items():
        print(f"FAILED {row}: {what}", file=sys.stderr)
    return 1 if bad else 0


def marked(rows: Rows) -> dict[str, str]:
    """The failures of each marked row: ``{"convoy at 32": "12 refused"}``."""
    return {
        f"{name} at {connections}": explain(row)
        for name, found in rows.items()
        for connections, row in found.items()
        if failures(row)
    }


def measured(needed: Rows, value: Callable[[], float]) -> float | str:
    """``value()``, or a text that names the marked rows among ``needed``."""
    bad = marked(needed)
    if bad:
        return "not measured: " + "; ".join(f"{row}: {what}" for row, what in bad.items())
    return value()


def ratio(rows: Rows, other: str, connections: str = "32", figure: str = "rps") -> float | str:
    """Convoy's figure divided by another server's."""
    needed = {name: {connections: rows[name][connections]} for name in ("convoy", other)}
    return measured(
        needed,
        lambda: needed["convoy"][connections][figure] / needed[other][connections][figure],
    )


def of_peak(rows: Rows, connections: str) -> float | str:
    """Convoy's requests/s at ``connections``, divided by those of its best clean row."""
    found = rows["convoy"]
    return measured(
        {"convoy": {connections: found[connections]}},
        lambda: (
            found[connections]["rps"]
            / max(row["rps"] for row in found.values() if not failures(row))
        ),
    )


def promises(workload: str, rows: Rows, found: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """Each promise: its name, the bound, and the measured figure or why there is none."""
    convoy = rows["convoy"]
    at_32 = {"convoy": {"32": convoy["32"]}}
    common = [
        ("p99 at 8 connections / textbook's", "< 1", ratio(rows, "textbook", "8", "p99_ms")),
        ("p99 at 32 connections / textbook's", "< 1", ratio(rows, "textbook", "32", "p99_ms")),
        ("requests/s at 512 connections / peak", "≥ 0.9", of_peak(rows, "512")),
        ("requests that failed", "0", sum(sum(failures(row).values()) for row in convoy.values())),
        (
            "requests/s at 32 / textbook with the same engine",
            "–",
            ratio(rows, "textbook_same_engine"),
        ),
        ("start to ready, s", "≤ 4", found["start to ready, s"]),
    ]
    if workload == "w2":
        ceiling_rps = found["ceiling, pictures/s"]
        return [
            *common,
            ("requests/s at 32 / textbook", "≥ 5 (bf16), ≥ 8 (int8)", ratio(rows, "textbook")),
            (
                "requests/s at 32 / ceiling of decode and forward",
                "≥ 0.8",
                measured(at_32, lambda: convoy["32"]["rps"] / ceiling_rps),
            ),
        ]
    many = found["many in a request"]
    return [
        *common,
        ("requests/s at 32 / Flask no-op", "≥ 0.8", ratio(rows, "noop")),
        ("requests/s at 32 / textbook", "≥ 2.5", ratio(rows, "textbook")),
        ("requests/s at 32 / FastAPI", "≥ 1.5", ratio(rows, "fastapi")),
        ("p50 at 1 connection / textbook's", "≤ 1", ratio(rows, "textbook", "1", "p50_ms")),
        (
            f"pictures/s, {many['pictures']} in a request / singly",
            "≥ 2",
            measured(
                at_32 | {"many in a request": {"8": many}},
                lambda: many["pictures"] * many["rps"] / convoy["32"]["rps"],
            ),
        ),
        (
            "memory of the process tree per worker, MB",
            "≤ 450",
            found["memory of the process tree per worker, MB"],
        ),
    ]


def stages_line(found: dict[str, Any]) -> str:
    mean = ", ".join(f"{name} {value:.3f}" for name, value in found["stages, mean ms"].items())
    return f"Stages, mean ms over all runs: {mean}."


def describe(title: str, rows: Rows, promises: list[tuple[str, str, float | str]]) -> list[str]:
    """Lines of Markdown: the table of rows, and the table of promises."""
    lines = [
        f"## {title}",
        "",
        "| server | connections | requests/s, right | p50 ms | p99 ms | failures |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        for connections, row in found.items():
            mark = "✗ " if failures(row) else ""
            lines.append(
                f"| {mark}{name} | {connections} | {row['rps']:,.0f} | {row['p50_ms']:.2f} | "
                f"{row['p99_ms']:.1f} | {explain(row) or 0} |"
            )
    lines += ["", "| promise | wanted | measured |", "|---|---|---|"]
    for what, wanted, value in promises:
        shown = value if isinstance(value, str) else f"{value:.2f}"
        lines.append(f"| {what} | {wanted} | {shown} |")
    return [*lines, ""]


def write(file: Path, results: dict[str, Any], details: dict[str, Any], table: str) -> None:
    """Write ``file``, and next to it the raw figures, the table and the plot."""
    file.parent.mkdir(parents=True, exist_ok=True)
    where = details["where"]
    file.write_text(json.dumps({"where": where, **results}, indent=2) + "\n")
    file.with_suffix(".details.json").write_text(json.dumps(details, indent=2) + "\n")
    shown = ", ".join(f"{key} {value}" for key, value in where.items())
    file.with_suffix(".md").write_text(f"# Serving\n\n{shown}\n\n{table}\n")
    draw(results, file.with_suffix(".png"))


def draw(results: dict[str, Rows], file: Path) -> None:
    """Draw requests/s against connections, a panel for each workload; marked rows as crosses."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(results), figsize=(6 * len(results), 4.2), layout="constrained", squeeze=False
    )
    for axes, (workload, rows) in zip(panels[0], results.items(), strict=True):
        for name, found in rows.items():
            if workload == "w2" and name == "noop":
                continue  # it decodes no picture, and its curve would flatten all others
            colour = {"color": "0.6", "linestyle": "--"} if name == "noop" else {}
            clean = [(int(n), row["rps"]) for n, row in found.items() if not failures(row)]
            bad = [(int(n), row["rps"]) for n, row in found.items() if failures(row)]
            (line,) = axes.plot(
                [n for n, _ in clean],
                [rps for _, rps in clean],
                marker="o",
                label=name.replace("_", " "),
                linewidth=2.5 if name == "convoy" else 1.2,
                **colour,
            )
            axes.plot(
                [n for n, _ in bad], [rps for _, rps in bad], "x", color=line.get_color(), ms=9
            )
        axes.set(xscale="log", xlabel="connections", ylabel="requests/s", title=workload.upper())
        axes.set_xticks([1, 8, 32, 128, 512], ["1", "8", "32", "128", "512"])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=110)
