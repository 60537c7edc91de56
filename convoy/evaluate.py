"""The verb ``convoy evaluate``: the registry's, and ``--data``, which needs training's code."""

import argparse
from collections.abc import Sequence

import msgspec

from registry.cli.main import command_parser, run
from registry.cli.open import open_store
from registry.model.refs import CHAMPION, ref_of


def main(argv: Sequence[str] | None = None, prog: str = "convoy") -> int:
    """Run the command line of ``prog``; returns the exit status."""
    arguments = command_parser(prog).parse_args(argv)
    if arguments.data is None:
        return run(arguments)
    compare = arguments.run

    def record_and_compare(arguments: argparse.Namespace) -> int:
        is_champion = _record(arguments)
        arguments.data = None
        return 0 if is_champion else int(compare(arguments))

    arguments.run = record_and_compare
    return run(arguments)


def _record(arguments: argparse.Namespace) -> bool:
    """Score the version and keep the record; returns whether it is the champion."""
    # Loads engines. Imported only now, so that --help and typing errors answer at once.
    from training.publishing.later_evaluation import evaluate_later

    store = open_store()
    version = store.resolve(ref_of(arguments.name, arguments.version))
    found = evaluate_later(store, version, arguments.data)
    (count,) = found.data.counts.values()
    if not arguments.json:
        print(
            f"{version.name} version {version.version}: accuracy "
            f"{found.metrics['validation_accuracy']:.4f} on {count:,} pictures of {arguments.data},"
            " kept as its held-out record"
        )
    is_champion = CHAMPION in version.aliases
    if arguments.json and is_champion:
        print(msgspec.json.encode(found).decode())
    return is_champion
