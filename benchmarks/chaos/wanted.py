"""The bounds that each scenario must reach, or else ``python -m benchmarks.chaos`` exits with 1.

They equal the column *wanted* of ``docs/reliability.md``. A missing figure counts as not reached.
"""

from typing import Any, NamedTuple


class Bound(NamedTuple):
    """A figure, and its largest or smallest allowed value; for a list, its length counts."""

    figure: str
    most: float | None = 0
    least: float | None = None


def at_least(figure: str, least: float) -> Bound:
    return Bound(figure, most=None, least=least)


FAILED = Bound("failed")
UNDISTURBED = (
    FAILED,
    Bound("probes_failed"),
    Bound("p99_over_allowed_ms"),
    Bound("livez_worst_ms", 250),
    Bound("readyz_worst_ms", 250),
)
ATTACK = (*UNDISTURBED, Bound("worker_growth_mb", 64))
# A worker accepts bodies of 64 MiB, and holds 256 MiB of bodies at once.
ATTACK_WITH_LARGEST_BODIES = (*UNDISTURBED, Bound("worker_growth_mb", 256 + 64))
WANTED: dict[str, tuple[Bound, ...]] = {
    "kill-workers": (FAILED, Bound("back_worst_s", 3)),
    "rolling-restarts": (FAILED, Bound("p99_ratio", 3)),
    "sigterm": (Bound("lost"), Bound("wrong"), Bound("other")),
    "registry-faults": (
        FAILED,
        Bound("cold_start_worst_s", 10),
        *(
            Bound(f"{fault}_recovered_s", 60)
            for fault in ("refused", "hung", "slow", "cut", "flapping")
        ),
    ),
    "hostile-pictures": (
        Bound("server_errors"),
        Bound("workers_lost"),
        Bound("honest_failed"),
        Bound("refusal_p99_ms", 250),
        Bound("refusal_worst_ms", 1000),
        Bound("rss_growth_worst_mb", 32),
        Bound("honest_p99_ratio", 2),
    ),
    "overload": (
        at_least("goodput_of_peak_by_cores", 0.9),
        Bound("p99_503_ms", 150),
        Bound("lost"),
        Bound("wrong"),
        Bound("other"),
        Bound("not_connected"),
        Bound("livez_failed"),
        Bound("livez_p99_ms", 100),
        Bound("recovery_s", 2),
        Bound("failed_before"),
        Bound("failed_after"),
    ),
    "slow-clients": (FAILED, at_least("closed_by_us", 1)),
    "hostile-bundles": (
        FAILED,
        Bound("markers"),
        Bound("activations"),
        Bound("not_refused_in_time"),
        Bound("answered_by_another"),
    ),
    "malformed-http": (
        Bound("second_answers"),
        Bound("server_errors"),
        at_least("workers_survived", 1),
    ),
    "mutants": (
        Bound("unhandled"),
        Bound("guided_unhandled"),
        at_least("guided_mutants", 1),
    ),
    "described-api": (
        Bound("service_exit_status"),
        Bound("control_exit_status"),
        Bound("service_server_errors"),
        Bound("control_server_errors"),
        Bound("service_undocumented_codes"),
        Bound("control_undocumented_codes"),
    ),
    "soak": (
        FAILED,
        Bound("others_5xx_or_lost"),
        Bound("rss_slope_shown_mb_per_h", 1),
        at_least("same_workers", 1),
    ),
    "access-control": (Bound("opened"), Bound("decided")),
    "large-json": ATTACK,
    "large-tensors": ATTACK_WITH_LARGEST_BODIES,
    "empty-parts": ATTACK,
    "stalled-bodies": ATTACK,
    "many-scrapes": ATTACK,
    "impatient-clients": (
        at_least("w1_goodput_of_peak_per_cpu", 0.9),
        at_least("w2_goodput_of_peak_per_cpu", 0.9),
        Bound("w1_320_failed"),
        Bound("w2_80_failed"),
    ),
}


def missed(scenario: str, figures: dict[str, Any]) -> list[str]:
    """A line for each bound that ``figures`` miss; empty if they reach all."""
    found = []
    for figure, most, least in WANTED[scenario]:
        value = figures.get(figure)
        if value is None:
            found.append(f"{figure} is missing")
            continue
        number = len(value) if isinstance(value, list) else value
        if most is not None and not number <= most:
            found.append(f"{figure} is {value}, at most {most} was wanted")
        if least is not None and not number >= least:
            found.append(f"{figure} is {value}, at least {least} was wanted")
    return found
