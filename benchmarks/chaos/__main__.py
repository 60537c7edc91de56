"""``python -m benchmarks.chaos SCENARIO --json FILE --picture FILE``: what a hostile world does.

Everything happens on loopback, to processes that the scenario started, and ends by itself. Prints a
table, writes the figures as JSON, and draws the requests over time with the faults marked.
``docs/reliability.md`` has what came out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.chaos import load, pictures, workers
from benchmarks.chaos.traffic import Traffic, draw
from benchmarks.common import parser, report

Scenario = Callable[..., tuple[dict[str, Any], Traffic | None]]
SCENARIOS: dict[str, Scenario] = {
    "kill-workers": workers.kill_workers,
    "rolling-restarts": workers.rolling_restarts,
    "sigterm": workers.sigterm,
    "hostile-pictures": pictures.hostile_pictures,
    "overload": load.overload,
    "slow-clients": load.slow_clients,
    "mutants": pictures.many_mutants,
}


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("scenario", choices=SCENARIOS)
    options.add_argument("--picture", type=Path, metavar="FILE", help="draw the requests over time")
    options.add_argument("--amount", type=int, help="times, seconds or pictures; see the scenario")
    arguments = options.parse_args()
    scenario = SCENARIOS[arguments.scenario]
    figures, traffic = scenario(*([arguments.amount] if arguments.amount else []))
    report({"scenario": arguments.scenario, **figures}, arguments.json)
    if arguments.picture and traffic is not None:
        draw(traffic, arguments.picture, (scenario.__doc__ or "").partition("\n")[0])


if __name__ == "__main__":
    main()
