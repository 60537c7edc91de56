"""``convoy VERB …``: finds the package that has a verb, and runs it.

Imports nothing before the verb is known: ``convoy --help`` answers at once.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

TRAINING, REGISTRY, SERVICE = "training.__main__", "registry.cli.main", "service.__main__"
CLASSIFY = "convoy.classify.command"
IMPORT = "training.importing.command"
EVALUATE = "convoy.evaluate"

INTERRUPTED = 130  # 128 and the number of SIGINT, as shells report it

# Heading → verb → the module that has it, and what it does.
VERBS: dict[str, dict[str, tuple[str, str]]] = {
    "Train": {
        "train": (TRAINING, "train a network and register it as the next version"),
        "import": (IMPORT, "import a model that was trained elsewhere"),
        "compare": (
            TRAINING,
            "train several recipes with several seeds, and test on shifted pictures",
        ),
    },
    "View": {
        "list": (REGISTRY, "list models and their versions"),
        "show": (REGISTRY, "show one version: manifest, metrics, decisions"),
        "history": (REGISTRY, "list all decisions about a model"),
        "audit": (REGISTRY, "check the audit log for missing lines, and the aliases against it"),
        "traffic": (REGISTRY, "show requests, errors and latency of each version"),
        "plan": (REGISTRY, "benchmark the plans of a version on this machine"),
    },
    "Decide": {
        "evaluate": (EVALUATE, "compare a version with the champion"),
        "promote": (REGISTRY, "make a version the champion if the gate accepts it"),
        "roll-back": (REGISTRY, "make the previous champion champion again"),
        "canary": (REGISTRY, "have a challenger answer a share of real requests"),
    },
    "Serve": {
        "serve": (SERVICE, "serve models over HTTP"),
        "classify": (CLASSIFY, "classify pictures, on the terminal or into a file"),
        "pull": (REGISTRY, "download and deploy the versions to serve"),
        "control": (REGISTRY, "run the control plane: an API and pages for operators"),
    },
    "Secure": {
        "token": (REGISTRY, "manage the tokens for the service and the control plane"),
        "keygen": (REGISTRY, "make a key to sign versions with"),
        "sign": (REGISTRY, "sign a version with your private key"),
        "verify": (REGISTRY, "check the files and the signature of a version"),
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(usage(), file=sys.stderr)
        return 2
    verb = arguments[0]
    if verb in ("-h", "--help"):
        print(usage())
        return 0
    if verb == "--version":
        from registry.core.names import convoy_version

        print(f"convoy {convoy_version()}")
        return 0
    modules = {name: module for verbs in VERBS.values() for name, (module, _) in verbs.items()}
    if verb not in modules:
        close = difflib.get_close_matches(verb, modules, n=1)
        advice = f"did you mean {close[0]}?" if close else "convoy --help lists the verbs"
        print(f"error: convoy has no verb {verb!r}; {advice}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(modules[verb])
    except KeyboardInterrupt:  # importing may take seconds; afterwards, the verb handles Ctrl-C
        return INTERRUPTED
    except ModuleNotFoundError as error:
        print(f"error: convoy {verb} needs the package {error.name}", file=sys.stderr)
        return 2
    return int(module.main(arguments, prog="convoy"))


def usage() -> str:
    """What ``convoy --help`` prints."""
    lines = ["usage: convoy VERB …", "", "convoy VERB --help tells more about a verb."]
    for heading, verbs in VERBS.items():
        lines += ["", f"{heading}:"]
        lines += [f"  {name:<10} {about}" for name, (_, about) in verbs.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
