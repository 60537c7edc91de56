"""``convoy classify``: reads the command line, and connects a source with an output."""

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convoy.classify.progress import warn
from registry.core.console_logging import log_to_stderr
from registry.core.errors import ConvoyError, UsageError
from registry.core.names import one_line
from registry.core.service_address import DEFAULT_PORT, local_address

if TYPE_CHECKING:
    from convoy.classify.answer_file import AnswerFile
    from convoy.classify.bulk import Source, Summary
    from convoy.classify.inputs import Listing

MAX_TOP_K = 10_000
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None, prog: str = "convoy") -> int:
    """Run the command line of ``prog``.

    Returns:
        0; 1 if a picture got no answer; 2 if the run could not begin or go on; 130 after Ctrl-C.
    """
    _prepare_streams()
    arguments = command_parser(prog).parse_args(argv)
    log_to_stderr()
    try:
        return int(arguments.run(arguments))
    except ConvoyError as error:
        warn(f"error: {one_line(str(error))}")
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        return 1


def _prepare_streams() -> None:
    """Make it possible to print whatever the caller's streams and their encoding are."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: the next file would get its number
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python sets it for stderr


def command_parser(prog: str) -> argparse.ArgumentParser:
    """The verb ``classify``."""
    parser = argparse.ArgumentParser(prog=prog, description="Classify pictures.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    classify = commands.add_parser(
        "classify", help="classify pictures, on the terminal or into a file"
    )
    classify.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a picture, a folder, a pattern, or a CSV or Parquet file with a column uri, path or "
        "image",
    )
    classify.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write one row for each picture to a .csv, .jsonl or .parquet file; if the "
        "file exists, continue it",
    )
    classify.add_argument(
        "--restart", action="store_true", help="replace the --output file, and lose its rows"
    )
    host = os.environ.get("CONVOY_HOST") or "127.0.0.1"
    classify.add_argument(
        "--url",
        default=local_address(host, os.environ.get("CONVOY_PORT") or DEFAULT_PORT),
        help="address of the service (default %(default)s)",
    )
    where = classify.add_mutually_exclusive_group()
    where.add_argument("--model", help="name of the model (default: the service's first)")
    where.add_argument(
        "--local",
        metavar="MODEL",
        help="load models:/NAME@ALIAS or models:/NAME/NUMBER in this process, without a service",
    )
    classify.add_argument(
        "--top-k",
        type=int,
        default=5,
        metavar="K",
        help="classes to print, or with --output to store, for each picture (5)",
    )
    classify.add_argument("--json", action="store_true", help="print JSON, one object a line")
    classify.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="pictures to send at once (8)"
    )
    classify.set_defaults(run=_classify)
    return parser


def _classify(arguments: argparse.Namespace) -> int:
    if not 1 <= arguments.top_k <= MAX_TOP_K:
        raise UsageError(f"--top-k is {arguments.top_k}; it must be from 1 to {MAX_TOP_K}")
    if arguments.concurrency < 1:
        raise UsageError(f"--concurrency is {arguments.concurrency}; it must be 1 or more")
    if arguments.output is None and arguments.restart:
        raise UsageError("--restart needs --output")
    return _print(arguments) if arguments.output is None else _write(arguments)


def _print(arguments: argparse.Namespace) -> int:
    from convoy.classify.printing import print_answers

    listing = _listing(arguments)
    with _source(arguments) as source:
        return 1 if print_answers(source, listing.pictures, as_json=arguments.json) else 0


def _write(arguments: argparse.Namespace) -> int:
    """Classify into the file of ``--output``, after checking the arguments and the source."""
    from convoy.classify.answer_file import AnswerFile

    output: Path = arguments.output
    if output.exists() and any(
        Path(each).resolve() == output.resolve() for each in arguments.paths
    ):
        raise UsageError(f"{output} is both an input and the output; name another output")
    answers = AnswerFile(output, restart=arguments.restart)
    with _source(arguments) as source:
        model = source.check()
        listing = _listing(arguments)
        try:
            with answers:
                answers.known.check_comparable(model, arguments.top_k, source.class_count)
                summary = _go_on(answers, source, listing)
        except OSError as error:
            reason = f"{output} cannot be written: {error.strerror or error}"
            raise UsageError(f"{reason}; {_resume(output)}") from error
    return _report(summary, output, as_json=arguments.json)


def _listing(arguments: argparse.Namespace) -> "Listing":
    """The pictures; says on standard error what was skipped."""
    from convoy.classify.inputs import list_pictures
    from convoy.classify.printing import skipped_text

    listing = list_pictures(arguments.paths)
    if text := skipped_text(listing.skipped):
        warn(text)
    if not listing.pictures:
        warn("there is no picture to classify")
    return listing


def _go_on(answers: "AnswerFile", source: "Source", listing: "Listing") -> "Summary":
    from convoy.classify.answer_file import NotComparable
    from convoy.classify.bulk import classify_into

    try:
        return classify_into(answers, source, listing)
    except NotComparable:
        raise
    except ConvoyError as error:
        raise UsageError(f"{error}; {_resume(answers.path)}") from error


def _report(summary: "Summary", output: Path, *, as_json: bool) -> int:
    import msgspec

    from convoy.classify.printing import show, summary_text

    if as_json:
        show(json.dumps({**msgspec.to_builtins(summary), "output": str(output)}))
    else:
        show(summary_text(summary, str(output)))
    if summary.interrupted:
        warn(f"interrupted; {_resume(output)}")
        return INTERRUPTED
    return 1 if summary.failed else 0


def _resume(output: Path) -> str:
    return f"the rows of {output} are kept: run the same command again to go on"


@contextlib.contextmanager
def _source(arguments: argparse.Namespace) -> Iterator["Source"]:
    if arguments.local is not None:
        from convoy.classify.local_source import open_local

        with open_local(arguments.local, arguments.top_k) as source:
            yield source
        return
    is_bulk = arguments.output is not None
    try:
        from convoy.classify.http_source import open_http
    except ModuleNotFoundError as error:
        raise UsageError(
            f"convoy classify needs the package {error.name} to ask a service; install "
            "convoy-client, or use --local"
        ) from error
    names = arguments.url, arguments.model, arguments.top_k, arguments.concurrency
    with open_http(*names, is_bulk=is_bulk) as source:
        yield source
