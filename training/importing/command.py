"""The verb ``convoy import``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from registry.core.console_logging import log_to_stderr
from registry.core.errors import ConvoyError, ReferenceDiffers, UsageError
from registry.core.names import check_model_name
from registry.core.paths import convoy_paths

if TYPE_CHECKING:
    from training.importing.importer import Imported

MAX_LABELS_BYTES = 10_000_000
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None, prog: str = "convoy") -> int:
    """Run the command line of ``prog``.

    Returns:
        0; 1 if the model does not answer as its reference; 2 for any other error; 130 after Ctrl-C.
    """
    arguments = command_parser(prog).parse_args(argv)
    log_to_stderr()
    try:
        return _import(arguments)
    except ReferenceDiffers as error:
        print(f"error: {error}; nothing was registered", file=sys.stderr)
        return 1
    except (ConvoyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was registered", file=sys.stderr)
        return INTERRUPTED


def command_parser(prog: str) -> argparse.ArgumentParser:
    """The verb ``import``."""
    parser = argparse.ArgumentParser(prog=prog, description="Import a model trained elsewhere.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser("import", help="import a model that was trained elsewhere")
    add.add_argument("graph", type=Path, metavar="FILE", help="the model, an ONNX file")
    add.add_argument(
        "--labels", type=Path, required=True, metavar="FILE", help="its labels, one on each line"
    )
    add.add_argument(
        "--preprocess",
        required=True,
        metavar="FILE",
        help="a TOML file that says how pictures become its input, or a preset: imagenet, clip, "
        "inception",
    )
    add.add_argument(
        "--examples",
        type=Path,
        metavar="FOLDER",
        help="pictures to prove and calibrate plans with; in folders named after labels, the gate "
        "can judge the version",
    )
    add.add_argument(
        "--reference",
        type=Path,
        metavar="CSV",
        help="the answers that the model gave at home: columns file and label, or file and one "
        "for each label; the import is refused unless they are the same here",
    )
    add.add_argument("--model", help="name in the registry (default: that of the file)")
    add.add_argument("--output", help="the output with the scores, if the graph has several")
    add.add_argument(
        "--scores",
        choices=("logits", "probabilities"),
        help="what the output is (default: probabilities if the graph ends with a softmax)",
    )
    add.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _import(arguments: argparse.Namespace) -> int:
    name = check_model_name(arguments.model or arguments.graph.stem.replace("-", "_"))
    labels = read_labels(arguments.labels)
    graph = read_file(arguments.graph)
    # These modules load torch and MLflow. Imported only now, so that errors above answer at once.
    from training.importing.importer import Evidence, ForeignModel, import_model

    imported = import_model(
        ForeignModel(
            name=name,
            graph=graph,
            origin=arguments.graph.name,
            labels=labels,
            preprocess=arguments.preprocess,
            output=arguments.output,
            scores=arguments.scores,
        ),
        Evidence(examples=arguments.examples, reference=arguments.reference),
        convoy_paths(),
    )
    show(imported, as_json=arguments.json)
    return 0


def show(imported: "Imported", *, as_json: bool) -> None:
    """Print what an import made, and the command that serves it."""
    version, reference = imported.version, imported.reference
    if as_json:
        facts = {
            "model": version.name,
            "version": version.version,
            "reference": reference and {"pictures": reference.total, "equal": reference.equal},
            "accuracy": imported.accuracy,
            "plan_accuracy": imported.plan_accuracy,
        }
        print(json.dumps(facts))
        return
    print(f"registered as {version.name} version {version.version}, alias challenger")
    if reference:
        print(
            f"  reference   {reference.equal} of {reference.total} answers are equal; a "
            f"probability differs by {reference.largest_difference:.2g} at most"
        )
    else:
        print(
            "  reference   none: nothing proves that it answers as it did at home; use --reference"
        )
    if imported.accuracy is None:
        print("  accuracy    unknown: the examples have no labels, so the gate cannot judge it")
    else:
        print(f"  accuracy    {imported.accuracy:.4f} on the examples")
    for plan, accuracy in imported.plan_accuracy.items():
        what = "accuracy" if imported.accuracy is not None else "same best class as fp32"
        print(f"  {plan:<11} {what} {accuracy:.4f}")
    print(f"to serve it:\n  convoy promote {version.name} {version.version}")


def read_labels(file: Path) -> tuple[str, ...]:
    """The labels in ``file``, one on each line; a JSON list is read, too.

    Raises:
        UsageError: the file cannot be read, or a line is empty.
    """
    text = read_file(file, MAX_LABELS_BYTES).decode("utf-8-sig", "replace").strip("\n\r")
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{file} is not a JSON list: {error}") from error
        if not all(isinstance(each, str) for each in found):
            raise UsageError(f"{file} has a label that is not a text")
        return tuple(found)
    labels = tuple(line.strip() for line in text.splitlines())
    if "" in labels:
        raise UsageError(f"{file}, line {labels.index('') + 1} is empty; it needs a label")
    return labels


def read_file(file: Path, limit: int = 1_000_000_000) -> bytes:
    """The bytes of ``file``; ``UsageError`` if it cannot be read or has more than ``limit``."""
    try:
        if (size := file.stat().st_size) > limit:
            raise UsageError(f"{file} has {size:,} bytes; at most {limit:,} are accepted")
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
