"""``python -m benchmarks.chaos SCENARIO --json FILE --picture FILE``: faults under load.

A scenario attacks only processes that it started itself, on loopback, and ends by itself. It prints
a table, writes the figures as JSON, and draws the requests over time with the faults marked. The
exit status is 1 if a figure misses its bound in ``wanted.py``. ``docs/reliability.md`` has the
results.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.chaos import attacks, bundles, load, pictures, protocol, registry, soak, workers
from benchmarks.chaos.wanted import missed
from benchmarks.common import parser, report
from benchmarks.traffic import Traffic, draw

Scenario = Callable[..., tuple[dict[str, Any], Traffic | None]]
# In the same order as in docs/reliability.md.
SCENARIOS: dict[str, Scenario] = {
    "kill-workers": workers.kill_workers,
    "rolling-restarts": workers.rolling_restarts,
    "sigterm": workers.sigterm,
    "registry-faults": registry.registry_faults,
    "hostile-pictures": pictures.hostile_pictures,
    "overload": load.overload,
    "slow-clients": load.slow_clients,
    "hostile-bundles": bundles.hostile_bundles,
    "malformed-http": protocol.malformed_http,
    "mutants": pictures.many_mutants,
    "described-api": protocol.described_api,
    "soak": soak.soak,
    "access-control": protocol.access_control,
    "large-json": attacks.large_json,
    "large-tensors": attacks.large_tensors,
    "empty-parts": attacks.empty_parts,
    "stalled-bodies": attacks.stalled_bodies,
    "many-scrapes": attacks.many_scrapes,
    "impatient-clients": load.impatient_clients,
}


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("scenario", choices=[*SCENARIOS, "all"])
    options.add_argument("--picture", type=Path, metavar="FILE", help="draw the requests over time")
    options.add_argument(
        "--amount", type=int, metavar="N", help="times, seconds or pictures, by scenario"
    )
    arguments = options.parse_args()
    if arguments.scenario != "all":
        return play(arguments.scenario, arguments.json, arguments.picture, arguments.amount)
    for path in filter(None, (arguments.json, arguments.picture)):
        if not path.is_dir():
            options.error(f"all scenarios need a folder, which {path} is not")
    status = 0
    for name in SCENARIOS:
        print(f"== {name}", flush=True)
        status |= play(name, arguments.json, arguments.picture, None)
    return status


def play(name: str, file: Path | None, picture: Path | None, amount: int | None) -> int:
    """Play a scenario; returns 1 if a figure misses its bound.

    ``file`` gets the figures, and ``picture`` a drawing. If one is a folder, it gets a file that is
    named after the scenario.
    """
    if file and file.is_dir():
        file /= f"{name}.json"
    if picture and picture.is_dir():
        picture /= f"chaos-{name}.png"
    scenario = SCENARIOS[name]
    figures, traffic = scenario(*([amount] if amount else []))
    problems = missed(name, figures)
    report({"scenario": name, "not_reached": problems, **figures}, file)
    if picture and traffic is not None:
        draw(traffic, picture, (scenario.__doc__ or "").partition("\n")[0])
    for problem in problems:
        print(f"NOT REACHED {name}: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
