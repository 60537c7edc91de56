"""Commands that compare and decide: ``promote``, ``evaluate``, ``roll-back``, ``canary``."""

import argparse
from pathlib import Path
from typing import Any

import msgspec

from registry.cli.open import open_store
from registry.core.errors import UsageError
from registry.core.paths import convoy_paths
from registry.model.refs import Canary, ref_of


def add_to(commands: Any) -> None:
    """Add these commands to argparse's ``commands``."""
    promote = commands.add_parser(
        "promote", help="make a version the champion if the gate accepts it"
    )
    promote.add_argument("name")
    promote.add_argument("version", help="number or alias")
    promote.add_argument("--force", action="store_true", help="promote even if the gate refuses")
    promote.set_defaults(run=_promote)

    evaluate = commands.add_parser("evaluate", help="compare a version with the champion")
    evaluate.add_argument("name")
    evaluate.add_argument("version", nargs="?", default="challenger", help="number or alias")
    evaluate.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="first score the version on labelled pictures, in folders named after labels, and "
        "keep that as its held-out record",
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="also write an HTML page that shows the changed predictions",
    )
    evaluate.set_defaults(run=_evaluate)
    for command in (promote, evaluate):
        command.add_argument(
            "--skip-latency", action="store_true", help="do not time forward passes; saves seconds"
        )
        command.add_argument(
            "--allow-new-classes",
            action="store_true",
            help="accept new, removed or renamed classes; only the shared ones are compared",
        )

    roll_back = commands.add_parser("roll-back", help="make the previous champion champion again")
    roll_back.add_argument("name")
    roll_back.set_defaults(run=_roll_back)

    canary = commands.add_parser("canary", help="have a challenger answer a share of real requests")
    actions = canary.add_subparsers(required=True, metavar="start|stop")
    start_canary = actions.add_parser("start", help="start a canary; it replaces the present one")
    start_canary.add_argument("name")
    start_canary.add_argument("--challenger", required=True, metavar="N", help="number or alias")
    start_canary.add_argument(
        "--share",
        type=_share,
        default=0.0,
        metavar="10%",
        help="the share of requests that the challenger answers",
    )
    start_canary.add_argument(
        "--shadow",
        type=_share,
        nargs="?",
        const=1.0,
        default=0.0,
        metavar="25%",
        help="the share of the champion's images that the challenger also scores, without "
        "answering; all if no value is given",
    )
    start_canary.set_defaults(run=_start_canary)
    for command in (promote, roll_back, start_canary):
        command.add_argument(
            "--expect-champion",
            type=int,
            metavar="N",
            help="refuse if another version is the champion by then",
        )

    stop_canary = actions.add_parser(
        "stop", help="stop the canary: the champion answers all requests again"
    )
    stop_canary.add_argument("name")
    stop_canary.set_defaults(run=_stop_canary)
    for command in (promote, roll_back, start_canary, stop_canary):
        command.add_argument(
            "--reason",
            help="why; the audit log records it, and your $LOGNAME marked (unverified)",
        )


def _promote(arguments: argparse.Namespace) -> int:
    from registry.promotion.gate_runner import GateRunner
    from registry.promotion.promotion import promote

    store = open_store()
    number = store.resolve(ref_of(arguments.name, arguments.version)).version
    line = promote(
        store,
        arguments.name,
        number,
        expect_champion=arguments.expect_champion,
        force=arguments.force,
        allow_new_classes=arguments.allow_new_classes,
        reason=arguments.reason,
        gate_runner=GateRunner(store, convoy_paths(), timed=not arguments.skip_latency),
        on_result=lambda result: print(result.table(allow_new_classes=arguments.allow_new_classes)),
    )
    print(f"{arguments.name} version {number} is the champion now ({line.entry.action})")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from registry.promotion.gate_runner import GateRunner

    if arguments.data is not None:
        raise UsageError("--data needs torch or another engine; use convoy evaluate")
    store = open_store()
    number = store.resolve(ref_of(arguments.name, arguments.version)).version
    gate_runner = GateRunner(store, convoy_paths(), timed=not arguments.skip_latency)
    result = gate_runner.run(*store.champion_and_candidate(arguments.name, number))
    if arguments.page is not None:
        from registry.control.pages import gate_result_page

        arguments.page.write_text(gate_result_page(result))
    allowed = arguments.allow_new_classes
    table = result.table(allow_new_classes=allowed)
    print(msgspec.json.encode(result).decode() if arguments.json else table)
    return 0 if result.accepts(allow_new_classes=allowed) else 2


def _roll_back(arguments: argparse.Namespace) -> int:
    from registry.promotion.promotion import roll_back

    expected = arguments.expect_champion
    entry = roll_back(
        open_store(), arguments.name, arguments.reason, expect_champion=expected
    ).entry
    print(
        f"{arguments.name} version {entry.to_version} is the champion again; "
        f"version {entry.from_version} is 'previous'"
    )
    return 0


def _start_canary(arguments: argparse.Namespace) -> int:
    from registry.promotion.promotion import start_canary

    store = open_store()
    number = store.resolve(ref_of(arguments.name, arguments.challenger)).version
    canary = Canary(version=number, share=arguments.share, shadow=arguments.shadow)
    start_canary(
        store,
        arguments.name,
        canary,
        arguments.reason,
        expect_champion=arguments.expect_champion,
    )
    print(f"{arguments.name}: {canary}")
    print(f"  watch it: convoy traffic {arguments.name}")
    return 0


def _stop_canary(arguments: argparse.Namespace) -> int:
    from registry.promotion.promotion import stop_canary

    entry = stop_canary(open_store(), arguments.name, arguments.reason).entry
    print(f"{arguments.name}: version {entry.to_version} is no longer a canary")
    return 0


def _share(text: str) -> float:
    """Parse ``10%``. A bare number is refused: 1 could mean one percent or all."""
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else -1.0
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a share; write a percentage above 0% and up to 100%, such as 10%"
        )
    return share
