"""The verb ``convoy import``."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from registry.core.console_logging import log_to_stderr
from registry.core.errors import ConvoyError, ReferenceDiffers, UsageError
from registry.core.names import check_model_name
from registry.core.paths import convoy_paths
from training.importing.preprocess_file import read_members
from training.importing.reference import Evidence
from training.importing.sources.base import Request, Source, all_sources
from training.importing.sources.onnx_file import read_file

if TYPE_CHECKING:
    from training.importing.importer import Imported

MAX_LABELS_BYTES = 10_000_000
INTERRUPTED = 130
# The sources that the argument itself shows: a path, or models:/NAME/N.
FILE, MLFLOW = BY_FORM = ("onnx", "mlflow")
MLFLOW_SCHEME = "models:/"
DEFAULT_HELP = "an ONNX file, or models:/NAME/N: a version that MLflow logged in the flavour onnx"
WEIGHTS_HELP = "a file with the weights: safetensors, or a state_dict that torch saved"


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
    sources = add.add_argument_group("where the model comes from (one of these)")
    one = sources.add_mutually_exclusive_group(required=True)
    one.add_argument("source", nargs="?", metavar="FILE", help=DEFAULT_HELP)
    for source in all_sources().values():
        if source.name not in BY_FORM:
            one.add_argument(f"--{source.name}", metavar=source.metavar, help=source.help)
    sources.add_argument("--weights", type=Path, metavar="FILE", help=WEIGHTS_HELP)
    sources.add_argument(
        "--download", action="store_true", help="fetch weights that are not on this machine"
    )
    sources.add_argument(
        "--run-code",
        action="store_true",
        help="for models:/NAME/N of another flavour than onnx: run the code that it holds here",
    )
    about = add.add_argument_group("what is known of it")
    about.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="its labels, one on each line (default: those in the library's record)",
    )
    about.add_argument(
        "--preprocess",
        metavar="FILE",
        help="a TOML file that says how pictures become its input, or a preset: imagenet, clip, "
        "inception; its members replace those of the library's record",
    )
    about.add_argument("--output", help="the output with the scores, if the graph has several")
    about.add_argument(
        "--scores",
        choices=("logits", "probabilities"),
        help="what the output is (default: probabilities if the graph ends with a softmax)",
    )
    proof = add.add_argument_group("what it is proved with (at least one of these)")
    proof.add_argument(
        "--examples",
        type=Path,
        metavar="FOLDER",
        help="pictures to prove and calibrate plans with; in folders named after labels, the gate "
        "can judge the version",
    )
    proof.add_argument(
        "--reference",
        type=Path,
        metavar="CSV",
        help="the answers that the model gave at home: columns file and label, or file and one "
        "for each label; the import is refused unless they are the same here",
    )
    add.add_argument("--model", help="name in the registry (default: that of the source)")
    add.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _import(arguments: argparse.Namespace) -> int:
    source, what = _chosen(arguments)
    name = check_model_name(arguments.model) if arguments.model else None
    # Before the source is asked, which may take minutes.
    evidence = Evidence(examples=arguments.examples, reference=arguments.reference)
    request = Request(
        what=what,
        weights=arguments.weights,
        labels=read_labels(arguments.labels) if arguments.labels else None,
        preprocess=read_members(arguments.preprocess) if arguments.preprocess else {},
        download=arguments.download,
        run_code=arguments.run_code,
    )
    found = source.open(request)
    if not found.labels:
        raise UsageError(f"{what} does not say its labels; use --labels, a file with one a line")
    if not found.preprocess:
        raise UsageError(f"{what} does not say how pictures become its input; use --preprocess")
    # These modules load torch and MLflow. Imported only now, so that errors above answer at once.
    from training.importing.importer import ForeignModel, import_model

    imported = import_model(
        ForeignModel(
            name=name or check_model_name(re.sub("[^a-z0-9_]+", "_", found.name.lower())),
            graph=found.graph,
            origin=found.origin,
            labels=found.labels,
            preprocess=found.preprocess,
            output=arguments.output,
            scores=arguments.scores,
        ),
        evidence,
        convoy_paths(),
    )
    show(imported, as_json=arguments.json)
    return 0


def _chosen(arguments: argparse.Namespace) -> tuple[Source, str]:
    """The source that the user chose, and the value of its option."""
    sources = all_sources()
    if what := arguments.source:
        form = MLFLOW if what.startswith(MLFLOW_SCHEME) else FILE
        return sources[form], what
    return next(
        (source, value)
        for name, source in sources.items()
        if name not in BY_FORM and (value := getattr(arguments, name))
    )


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
        proof = "best classes only"
        if reference.largest_difference is not None:
            proof = f"a probability differs by {reference.largest_difference:.2g} at most"
        print(f"  reference   {reference.equal} of {reference.total} answers are equal; {proof}")
    else:
        print(
            "  reference   none: nothing proves that it answers as it did at home; use --reference"
        )
    names = ("shrink_on_load", "crop_early")
    shortcuts = [name for name in names if getattr(imported.preprocess, name)]
    print(f"  decoding    {', '.join(shortcuts) or 'without shortcuts'}")
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


if __name__ == "__main__":
    sys.exit(main())
