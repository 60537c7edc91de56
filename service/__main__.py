"""``python -m service`` serves; ``python -m service classify FILE…`` asks a running service."""

import argparse
import os
import sys
from collections.abc import Sequence

from registry.core.console_logging import log_to_stderr
from registry.core.errors import ConvoyError
from registry.core.service_address import DEFAULT_PORT, local_address


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


def _classify(arguments: argparse.Namespace) -> int:
    from service.client import classify_files

    return classify_files(
        arguments.files,
        arguments.url,
        arguments.model,
        arguments.top_k,
        arguments.json,
        os.environ.get("CONVOY_TOKEN"),  # not an option: other users can read command lines
    )


def command_parser(prog: str) -> argparse.ArgumentParser:
    """The verbs ``serve`` and ``classify``."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Serve image classifiers over HTTP. CONVOY_… variables hold the settings.",
    )
    parser.set_defaults(run=_serve, no_pull=False)
    commands = parser.add_subparsers(metavar="{serve,classify}")
    for command in (parser, commands.add_parser("serve", help="serve models over HTTP")):
        command.add_argument(
            "--no-pull",
            action="store_true",
            default=argparse.SUPPRESS,  # a default would undo the option before the sub-command
            help="serve the versions on disk; do not follow the registry",
        )
    classify = commands.add_parser("classify", help="classify files with a running service")
    classify.add_argument("files", nargs="+", metavar="FILE")
    host = os.environ.get("CONVOY_HOST") or "127.0.0.1"
    classify.add_argument(
        "--url",
        default=local_address(host, os.environ.get("CONVOY_PORT") or DEFAULT_PORT),
        help="address of the service (default %(default)s)",
    )
    classify.add_argument("--model", help="name of the model (default: the service's first)")
    classify.add_argument("--top-k", type=int, default=5)
    classify.add_argument("--json", action="store_true", help="one JSON object a line")
    classify.set_defaults(run=_classify)
    return parser


if __name__ == "__main__":
    sys.exit(main())
