"""``python -m registry``: list, compare, promote, roll back, start a canary, pull and control."""

import argparse
import os
import sys
from collections.abc import Sequence

from registry.cli import decisions, keys, serving, versions
from registry.cli.secret_files import with_secrets
from registry.core.console_logging import log_to_stderr
from registry.core.errors import ConvoyError
from registry.core.names import one_line


def main(argv: Sequence[str] | None = None, prog: str = "python -m registry") -> int:
    """Run the command line of ``prog``; returns the exit status."""
    return run(command_parser(prog).parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Run parsed arguments; returns the exit status."""
    log_to_stderr("%(asctime)s %(name)s %(message)s")
    try:
        os.environ.update(with_secrets(os.environ))
        return int(arguments.run(arguments))
    except ConvoyError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2


def command_parser(prog: str) -> argparse.ArgumentParser:
    """All verbs of the registry."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="The registry of model versions: list and compare versions, promote them, roll "
        "back, run canaries, and bring versions to the machines that serve.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (versions, decisions, serving, keys):
        group.add_to(commands)
    return parser
