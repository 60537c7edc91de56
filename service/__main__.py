"""``python -m service`` and ``convoy serve``: serve models over HTTP."""

import argparse
import sys
from collections.abc import Sequence

from registry.core.console_logging import log_to_stderr
from registry.core.errors import ConvoyError


def main(argv: Sequence[str] | None = None, prog: str = "python -m service") -> int:
    """Run the command line of ``prog``; returns the exit status."""
    arguments = command_parser(prog).parse_args(argv)
    log_to_stderr()
    try:
        return int(arguments.run(arguments))
    except ConvoyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _serve(arguments: argparse.Namespace) -> int:
    from service.settings import Settings
    from service.supervisor import serve

    return serve(Settings.from_environment(), pull=not arguments.no_pull)


def command_parser(prog: str) -> argparse.ArgumentParser:
    """The verb ``serve``, which may be left out."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Serve image classifiers over HTTP. CONVOY_… variables hold the settings.",
    )
    parser.set_defaults(run=_serve, no_pull=False)
    commands = parser.add_subparsers(metavar="{serve}")
    for command in (parser, commands.add_parser("serve", help="serve models over HTTP")):
        command.add_argument(
            "--no-pull",
            action="store_true",
            default=argparse.SUPPRESS,  # a default would undo the option before the sub-command
            help="serve the versions on disk; do not follow the registry",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
