"""Verbs that judge and decide: ``promote``, ``judge``, ``roll-back``, ``release``, ``withdraw``."""

import argparse
from pathlib import Path
from typing import Any

import msgspec

from registry.cli.open import open_store
from registry.core.paths import convoy_home
from registry.model.refs import Trial, ref_of


def add_to(commands: Any) -> None:
    """Add these verbs to argparse's ``commands``."""
    promote = commands.add_parser("promote", help="make a version the champion if it is no worse")
    promote.add_argument("name")
    promote.add_argument("version", help="number or alias")
    promote.add_argument("--force", action="store_true", help="promote even if the gate refuses")
    promote.set_defaults(run=_promote)

    judge = commands.add_parser("judge", help="what the gate says of a version, nothing moved")
    judge.add_argument("name")
    judge.add_argument("version", nargs="?", default="challenger", help="number or alias")
    judge.add_argument("--json", action="store_true", help="print JSON")
    judge.add_argument(
        "--page", type=Path, metavar="FILE", help="write it there too, with the flipped pictures"
    )
    judge.set_defaults(run=_judge)
    for command in (promote, judge):
        command.add_argument(
            "--untimed", action="store_true", help="run no forward passes: takes seconds less"
        )
        command.add_argument(
            "--allow-new-classes",
            action="store_true",
            help="accept classes that are new, removed or renamed, judged by those that both have",
        )

    roll_back = commands.add_parser("roll-back", help="make the previous champion champion again")
    roll_back.add_argument("name")
    roll_back.set_defaults(run=_roll_back)

    release = commands.add_parser("release", help="try a version on real traffic")
    release.add_argument("name")
    release.add_argument("--challenger", required=True, metavar="N", help="number or alias")
    release.add_argument(
        "--share", type=_share, default=0.0, metavar="10%", help="of the requests that it answers"
    )
    release.add_argument(
        "--shadow",
        type=_share,
        nargs="?",
        const=1.0,
        default=0.0,
        metavar="25%",
        help="of the champion's images that it scores too; alone: of all",
    )
    release.set_defaults(run=_release)
    for command in (promote, roll_back, release):
        command.add_argument(
            "--expect-champion",
            type=int,
            metavar="N",
            help="refuse when another version is the champion by then",
        )

    withdraw = commands.add_parser("withdraw", help="end the trial of a version")
    withdraw.add_argument("name")
    withdraw.set_defaults(run=_withdraw)
    for command in (promote, roll_back, release, withdraw):
        command.add_argument(
            "--reason", help="why; recorded with the decision, as is $LOGNAME, marked (unverified)"
        )


def _promote(arguments: argparse.Namespace) -> int:
    from registry.promotion.gate_runner import Judge
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
        judge=Judge(store, convoy_home(), timed=not arguments.untimed),
        on_judged=lambda judged: print(judged.table(allow_new_classes=arguments.allow_new_classes)),
    )
    print(f"{arguments.name} version {number} is the champion now ({line.entry.action})")
    return 0


def _judge(arguments: argparse.Namespace) -> int:
    from registry.promotion.gate_runner import Judge

    store = open_store()
    number = store.resolve(ref_of(arguments.name, arguments.version)).version
    judge = Judge(store, convoy_home(), timed=not arguments.untimed)
    judged = judge.judge(*store.sides(arguments.name, number))
    if arguments.page is not None:
        from registry.control.pages import verdict_page

        arguments.page.write_text(verdict_page(judged))
    allowed = arguments.allow_new_classes
    table = judged.table(allow_new_classes=allowed)
    print(msgspec.json.encode(judged).decode() if arguments.json else table)
    return 0 if judged.accepts(allow_new_classes=allowed) else 2


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


def _release(arguments: argparse.Namespace) -> int:
    from registry.promotion.promotion import release

    store = open_store()
    number = store.resolve(ref_of(arguments.name, arguments.challenger)).version
    trial = Trial(version=number, share=arguments.share, shadow=arguments.shadow)
    release(
        store,
        arguments.name,
        trial,
        arguments.reason,
        expect_champion=arguments.expect_champion,
    )
    print(f"{arguments.name}: {trial}")
    print(f"  watch it: python -m registry compare {arguments.name}")
    return 0


def _withdraw(arguments: argparse.Namespace) -> int:
    from registry.promotion.promotion import withdraw

    entry = withdraw(open_store(), arguments.name, arguments.reason).entry
    print(f"{arguments.name}: version {entry.to_version} is no longer on trial")
    return 0


def _share(text: str) -> float:
    """``10%``; a bare number could as well mean that many of a hundred as that many times all."""
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else -1.0
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write 10%")
    return share
