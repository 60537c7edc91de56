"""``python -m training``: train a network and register it, or compare recipes."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence

from registry.core.console_logging import log_to_stderr
from registry.core.errors import ConvoyError, NetworkImpossible, UsageError
from registry.core.names import check_model_name
from registry.core.paths import convoy_paths
from training.fitting.recipes import RECIPES, choose_recipe


def main(argv: Sequence[str] | None = None, prog: str = "python -m training") -> int:
    """Run the command line of ``prog``; returns the exit status."""
    words = _with_default_command(sys.argv[1:] if argv is None else argv)
    arguments = command_parser(prog).parse_args(words)
    log_to_stderr()
    try:
        return int(arguments.run(arguments))
    except NetworkImpossible as error:
        advice = f"; for example --set {error.suggestion}" if error.suggestion else ""
        print(f"error: {error}{advice}", file=sys.stderr)
        return 2
    except ConvoyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {error}; if an epoch was finished, continue from it with --resume",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted; if an epoch was finished, continue with --resume", file=sys.stderr)
        return 130


def _train(arguments: argparse.Namespace) -> int:
    recipe = choose_recipe(arguments.recipe, arguments.set)
    model = check_model_name(arguments.model or _model_name(arguments.data))
    # These modules load torch. Imported only now, so that --help and typing errors answer at once.
    from training.data.sources import load_dataset, picture_side_px
    from training.fitting.network_fit import fit_to_pictures
    from training.jobs import train_and_publish

    paths = convoy_paths()
    recipe = fit_to_pictures(recipe, picture_side_px(arguments.data, arguments.image_size))
    data = load_dataset(arguments.data, paths.datasets, arguments.image_size)
    finished, registered = train_and_publish(
        data,
        recipe,
        model,
        paths,
        seed=arguments.seed,
        device=arguments.device,
        resume=arguments.resume,
        register=not arguments.no_register,
    )
    version = registered.version if registered else None
    summary = {
        "model": model,
        "version": version,
        "run_id": finished.run_id,
        "validation_accuracy": finished.validation.accuracy,
        "test_accuracy": finished.test.accuracy,
        "seconds": round(finished.seconds, 1),
    }
    if arguments.json:
        print(json.dumps(summary))
        return 0
    print(
        f"{recipe.name} on {data.name}: validation accuracy {finished.validation.accuracy:.4f}, "
        f"test accuracy {finished.test.accuracy:.4f}, trained in {finished.seconds:.0f} s"
    )
    if version is not None:
        print(f"registered as {model} version {version}, alias challenger; to serve it:")
        print(f"  convoy promote {model} {version}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    if arguments.seeds < 1:
        raise UsageError(f"--seeds is {arguments.seeds}; it must be at least 1")
    names = arguments.recipes.split(",")
    if len(set(names)) != len(names):
        raise UsageError(f"--recipes names a recipe twice: {arguments.recipes}")
    recipes = [choose_recipe(name, arguments.set) for name in names]
    from training.data.sources import load_dataset, picture_side_px
    from training.fitting.network_fit import fit_to_pictures
    from training.jobs import compare

    paths = convoy_paths()
    side_px = picture_side_px(arguments.data, arguments.image_size)
    recipes = [fit_to_pictures(recipe, side_px) for recipe in recipes]
    data = load_dataset(arguments.data, paths.datasets, arguments.image_size)
    comparison = compare(data, recipes, arguments.seeds, paths, arguments.device)
    heading, rows = comparison.table()
    widths = [max(len(row[i]) for row in [heading, *rows]) for i in range(len(heading))]
    for row in [heading, *rows]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    print(f"curves and page: MLflow run {comparison.run_id}, artefacts under report/")
    return 0


def command_parser(prog: str) -> argparse.ArgumentParser:
    """The verbs ``train`` and ``compare``."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train an image classifier and register it as the model's next version.",
        epilog="To compare several recipes on the same data, see: convoy compare -h",
    )
    commands = parser.add_subparsers(metavar="{train,compare}")
    train = commands.add_parser("train", help="train a network and register it as the next version")
    train.add_argument("--recipe", default="cnn", help=f"{' | '.join(RECIPES)} (default cnn)")
    train.add_argument("--model", help="name in the registry (default: the data set's name)")
    train.add_argument("--seed", type=_integer(0, 2**31), default=0)
    train.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint of the same run"
    )
    train.add_argument(
        "--no-register", action="store_true", help="log the run, but register no version"
    )
    train.add_argument("--json", action="store_true", help="print the result as JSON")
    train.set_defaults(run=_train)
    compare = commands.add_parser(
        "compare", help="train several recipes with several seeds, and test on shifted pictures"
    )
    compare.add_argument("--recipes", default="dense,cnn", help="comma-separated")
    compare.add_argument("--seeds", type=int, default=3, help="runs of each recipe")
    compare.set_defaults(run=_compare)
    for command in (train, compare):
        command.add_argument(
            "--data",
            default="fashion-mnist",
            help="fashion-mnist[:FOLDER] | digits | folder:FOLDER (default fashion-mnist)",
        )
        command.add_argument(
            "--image-size",
            type=_integer(8, 4096),
            metavar="PX",
            help="side of the pictures of folder:FOLDER (default 64)",
        )
        command.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="change the recipe or its network: epochs=3, filters=32,64, pooling=average; "
            "docs/training.md lists all parameters",
        )
    return parser


def _integer(least: int, most: int) -> Callable[[str], int]:
    """A parser of integers for argparse, which prints the text of the error."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {least} to {most}")
        return int(text)

    return parse


def _model_name(data: str) -> str:
    """The default name of the model: ``folder:./my pictures`` gives ``my_pictures``."""
    kind, _, path = data.partition(":")
    folder = path.rstrip("/").rpartition("/")[2]
    return "fashion" if kind == "fashion-mnist" else re.sub(r"[^A-Za-z0-9_-]", "_", folder or kind)


def _with_default_command(argv: Sequence[str]) -> list[str]:
    """``argv`` with ``train`` in front, unless it names a command or asks for help."""
    if argv and (argv[0] in ("train", "compare") or argv[0] in ("-h", "--help")):
        return list(argv)
    return ["train", *argv]


if __name__ == "__main__":
    sys.exit(main())
