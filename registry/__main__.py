"""``python -m registry``: look at versions, judge, try, promote, take back, and follow."""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from registry import trust_commands
from registry.contract import ModelRef, Trial, parse_model_ref, parse_model_refs, ref_of
from registry.devices import serving_threads
from registry.errors import ConvoyError, UsageError
from registry.home import Home, convoy_home
from registry.plain_logs import log_to_stderr
from registry.secret_files import with_secrets
from registry.tables import decision, live_page, plans_table, version_page, versions_table
from registry.texts import one_line

if TYPE_CHECKING:
    from registry.bundle import Bundle
    from registry.store import ModelStore

AUDIT_AGAIN_S = 2.0
# On the machine that serves, requests come first.
PULLER_NICE = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    log_to_stderr("%(asctime)s %(name)s %(message)s")
    try:
        os.environ.update(with_secrets(os.environ))
        return int(arguments.run(arguments))
    except ConvoyError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2


def _store() -> "ModelStore":
    from registry.store import ModelStore  # seconds of MLflow: not for --help

    return ModelStore(convoy_home())


def _list(arguments: argparse.Namespace) -> int:
    store = _store()
    names = [arguments.name] if arguments.name else store.models()
    rows = [(version, tags) for name in names for version, tags in store.versions(name)]
    if arguments.json:
        print(
            json.dumps([{**msgspec.to_builtins(version), "tags": tags} for version, tags in rows])
        )
        return 0
    if not rows:
        print("no versions yet; python -m training makes one")
        return 0
    print(versions_table(rows))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    store = _store()
    ref = ref_of(arguments.name, arguments.version)
    version = store.resolve(ref)
    manifest = store.manifest(version)
    lines = store.ledger(arguments.name).lines
    shown = {
        "version": msgspec.to_builtins(version),
        "manifest": msgspec.to_builtins(manifest),
        "decisions": msgspec.to_builtins(lines),
    }
    if arguments.json:
        print(json.dumps(shown))
        return 0
    print(version_page(version, manifest, lines))
    return 0


def _promote(arguments: argparse.Namespace) -> int:
    from registry.judging import Judge
    from registry.promotion import promote

    store = _store()
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
    from registry.judging import Judge

    store = _store()
    number = store.resolve(ref_of(arguments.name, arguments.version)).version
    judge = Judge(store, convoy_home(), timed=not arguments.untimed)
    judged = judge.judge(*store.sides(arguments.name, number))
    if arguments.page is not None:
        from registry.pages import verdict_page

        arguments.page.write_text(verdict_page(judged))
    allowed = arguments.allow_new_classes
    table = judged.table(allow_new_classes=allowed)
    print(msgspec.json.encode(judged).decode() if arguments.json else table)
    return 0 if judged.accepts(allow_new_classes=allowed) else 2


def _roll_back(arguments: argparse.Namespace) -> int:
    from registry.promotion import roll_back

    expected = arguments.expect_champion
    entry = roll_back(_store(), arguments.name, arguments.reason, expect_champion=expected).entry
    print(
        f"{arguments.name} version {entry.to_version} is the champion again; "
        f"version {entry.from_version} is 'previous'"
    )
    return 0


def _release(arguments: argparse.Namespace) -> int:
    from registry.promotion import release

    store = _store()
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
    from registry.promotion import withdraw

    entry = withdraw(_store(), arguments.name, arguments.reason).entry
    print(f"{arguments.name}: version {entry.to_version} is no longer on trial")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from registry.services import read_live, service_addresses

    services = service_addresses()
    while True:
        live = read_live(services, arguments.name)
        if arguments.json:
            print(json.dumps(msgspec.to_builtins(live)))
        else:
            home = "\033[H\033[2J" if arguments.watch and sys.stdout.isatty() else ""
            print(home + live_page(live))
        if not arguments.watch:
            return 0
        time.sleep(arguments.interval)


def _history(arguments: argparse.Namespace) -> int:
    from registry.ledger import moments

    store = _store()
    store.aliases(arguments.name)  # says so if there is no such model
    ledger = store.ledger(arguments.name)
    lines = ledger.reigns(*moments(arguments.at)) if arguments.at else ledger.lines
    if arguments.json:
        print(json.dumps(msgspec.to_builtins(lines)))
        return 0
    if arguments.at is not None:
        versions = ", then ".join(str(line.entry.to_version) for line in lines)
        print(f"{arguments.name} on {arguments.at}: version {versions or 'none'}")
    for line in lines:
        print(decision(line))
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from registry.promotion import audit

    store = _store()
    names = [arguments.name] if arguments.name else store.models()
    failed = False
    for name in names:
        lines, faults = audit(store, name)
        if faults:  # of somebody who promotes at this moment, perhaps
            time.sleep(AUDIT_AGAIN_S)
            lines, faults = audit(store, name)
        failed = failed or bool(faults)
        print(one_line(f"{name}: {lines} lines, {'; '.join(faults) or 'all in order'}"))
    return 1 if failed else 0


def _pull(arguments: argparse.Namespace) -> int:
    if arguments.ref:
        refs = parse_model_refs(",".join(arguments.ref), said_by="REF")
    else:
        refs = parse_model_refs(os.environ.get("CONVOY_MODEL"))
    if not arguments.interval > 0:
        raise UsageError(f"--interval is {arguments.interval}; it must be above 0 seconds")
    from registry.lookout import Lookout
    from registry.pull import Puller
    from registry.services import service_addresses

    services = service_addresses() if arguments.watch and arguments.guard else ()
    lookout = Lookout(convoy_home(), services, "puller") if arguments.guard else None
    puller = Puller(_store, convoy_home(), refs, lookout)
    if not arguments.watch:
        return 0 if puller.pull_all() else 2
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    os.nice(PULLER_NICE)
    threading.Thread(target=puller.guard, args=(stop,), name="guard", daemon=True).start()
    puller.watch(stop, arguments.interval)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from registry.control import serve

    if not arguments.port.isdecimal():
        raise UsageError(f"the control plane's port is {arguments.port!r}; it must be a number")
    return serve(arguments.host, int(arguments.port), guard=arguments.guard)


def _plan(arguments: argparse.Namespace) -> int:
    from registry.devices import choose_device
    from registry.plans.choice import AUTO, Planner

    home = convoy_home()
    text = arguments.ref if arguments.ref.startswith("models:/") else f"models:/{arguments.ref}"
    wanted = os.environ.get("CONVOY_PLAN") or AUTO
    threads = arguments.threads or serving_threads()
    planner = Planner(home.plans, choose_device(arguments.device), threads, wanted)
    with tempfile.TemporaryDirectory(prefix="convoy-plan-") as folder:
        bundle = _bundle_at_hand(parse_model_ref(text), home, Path(folder))
        choice = planner.choose(bundle, anew=arguments.anew)
    manifest = bundle.manifest
    if arguments.json:
        print(json.dumps(msgspec.to_builtins(choice, str_keys=True)))
        return 0
    print(f"{manifest.model} on {planner.device}, {threads} thread(s) a forward pass")
    print(plans_table(choice, manifest))
    return 0


def _bundle_at_hand(ref: ModelRef, home: Home, folder: Path) -> "Bundle":
    """What the puller laid out, if it is that; else downloaded into ``folder``."""
    from registry.bundle import open_bundle
    from registry.releases import all_releases, version_folder

    found = (release.find(ref) for release in all_releases(home.models, ref.name))
    if released := next(filter(None, found), None):
        laid_out = version_folder(home.models, ref.name, released.version)
        return open_bundle(laid_out, released.manifest_sha256)
    store = _store()
    return store.download(store.resolve(ref), folder, lambda bundle: bundle.serving_files())


def _share(text: str) -> float:
    """``10%``; a bare number could as well mean that many of a hundred as that many times all."""
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else -1.0
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write 10%")
    return share


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m registry",
        description="The registry of model versions: look, judge, try, promote, take back, follow.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="models and their versions")
    listing.add_argument("name", nargs="?", help="only this model")
    listing.set_defaults(run=_list)

    show = commands.add_parser("show", help="one version: manifest, metrics, decisions")
    show.add_argument("name")
    show.add_argument("version", nargs="?", default="champion", help="number or alias")
    show.set_defaults(run=_show)
    for command in (listing, show):
        command.add_argument("--json", action="store_true", help="print JSON")

    promote = commands.add_parser("promote", help="make a version the champion if it is no worse")
    promote.add_argument("name")
    promote.add_argument("version", help="number or alias")
    promote.add_argument("--force", action="store_true", help="whatever the gate says")
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

    compare = commands.add_parser("compare", help="how the versions that serve do, live")
    compare.add_argument("name")
    compare.add_argument("--watch", action="store_true", help="again and again")
    compare.add_argument("--interval", type=float, default=2.0, metavar="S", help="seconds between")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.set_defaults(run=_compare)

    history = commands.add_parser(
        "history",
        help="every decision about a model",
        description="Every decision about a model. A name with (unverified) is one that a command "
        "line took from $LOGNAME, which its user sets at will; names without it are those of the "
        "control plane's tokens, which it has checked, or of machines.",
    )
    history.add_argument("name")
    history.add_argument("--at", metavar="DAY", help="who was champion on 2026-11-17 (UTC)")
    history.add_argument("--json", action="store_true", help="print JSON")
    history.set_defaults(run=_history)

    audit = commands.add_parser(
        "audit",
        help="are lines of the log missing, and do the aliases agree with it",
        description="Finds lines of the log that are missing or unreadable, a log that publishing "
        "did not make, and aliases that disagree with it. It does not find lines that an account "
        "with write access to the registry has rewritten.",
    )
    audit.add_argument("name", nargs="?", help="only this model")
    audit.set_defaults(run=_audit)

    plan = commands.add_parser(
        "plan", help="which ways of running a version are right here, and how fast"
    )
    plan.add_argument("ref", metavar="NAME@ALIAS", help="or NAME/NUMBER")
    plan.add_argument("--anew", action="store_true", help="measure again")
    plan.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    plan.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of one forward pass; serving has cores / workers",
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)

    serve = commands.add_parser("serve", help="the control plane: an API and pages for operators")
    serve.add_argument("--host", default=os.environ.get("CONVOY_CONTROL_HOST") or "127.0.0.1")
    serve.add_argument("--port", default=os.environ.get("CONVOY_CONTROL_PORT") or "8081")
    serve.add_argument(
        "--guard", action="store_true", help="end trials that break the policy, instead of pullers"
    )
    serve.set_defaults(run=_serve)

    trust_commands.add_to(commands)

    pull = commands.add_parser("pull", help="bring what should serve to disk and release it")
    pull.add_argument(
        "ref", nargs="*", help="models:/NAME@ALIAS or models:/NAME/NUMBER (default: CONVOY_MODEL)"
    )
    pull.add_argument("--watch", action="store_true", help="go on following the registry")
    pull.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds between looks"
    )
    pull.add_argument(
        "--no-guard",
        dest="guard",
        action="store_false",
        help="write nothing to the registry: `serve --guard` ends trials, says what is refused",
    )
    pull.set_defaults(run=_pull)
    return parser


if __name__ == "__main__":
    sys.exit(main())
