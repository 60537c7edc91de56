"""Commands about serving: ``traffic``, ``plan``, ``control`` and ``pull``."""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from registry.cli.open import open_store
from registry.cli.render import plans_table, traffic_page
from registry.core.devices import serving_threads
from registry.core.errors import UsageError
from registry.core.paths import Paths, convoy_paths
from registry.model.refs import ModelRef, parse_model_ref, parse_model_refs

if TYPE_CHECKING:
    from registry.model.bundle import Bundle

# The puller shares its machine with the workers; their requests come first.
PULLER_NICE = 10


def add_to(commands: Any) -> None:
    """Add these commands to argparse's ``commands``."""
    traffic = commands.add_parser(
        "traffic", help="show requests, errors and latency of each version"
    )
    traffic.add_argument("name")
    traffic.add_argument("--watch", action="store_true", help="repeat until interrupted")
    traffic.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds between updates"
    )
    traffic.add_argument("--json", action="store_true", help="print JSON")
    traffic.set_defaults(run=_traffic)

    plan = commands.add_parser("plan", help="benchmark the plans of a version on this machine")
    plan.add_argument("ref", metavar="NAME@ALIAS", help="or NAME/NUMBER")
    plan.add_argument("--refresh", action="store_true", help="measure again")
    plan.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    plan.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads for one forward pass; workers of the service have cores / workers",
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)

    serve = commands.add_parser(
        "control", help="run the control plane: an API and pages for operators"
    )
    serve.add_argument("--host", default=os.environ.get("CONVOY_CONTROL_HOST") or "127.0.0.1")
    serve.add_argument("--port", default=os.environ.get("CONVOY_CONTROL_PORT") or "8081")
    serve.add_argument(
        "--guard",
        action="store_true",
        help="end canaries that break the policy, so that pullers need not do it",
    )
    serve.set_defaults(run=_serve)

    pull = commands.add_parser("pull", help="download and deploy the versions to serve")
    pull.add_argument(
        "ref", nargs="*", help="models:/NAME@ALIAS or models:/NAME/NUMBER (default: CONVOY_MODEL)"
    )
    pull.add_argument("--watch", action="store_true", help="keep following the registry")
    pull.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds between polls"
    )
    pull.add_argument(
        "--no-guard",
        dest="guard",
        action="store_false",
        help="write nothing to the registry; `convoy control --guard` stops canaries instead",
    )
    pull.set_defaults(run=_pull)


def _traffic(arguments: argparse.Namespace) -> int:
    from registry.canary.serving_client import read_serving_status, service_addresses

    services = service_addresses()
    while True:
        status = read_serving_status(services, arguments.name)
        if arguments.json:
            print(json.dumps(msgspec.to_builtins(status)))
        else:
            clear_screen = "\033[H\033[2J" if arguments.watch and sys.stdout.isatty() else ""
            print(clear_screen + traffic_page(status))
        if not arguments.watch:
            return 0
        time.sleep(arguments.interval)


def _plan(arguments: argparse.Namespace) -> int:
    from registry.core.devices import choose_device
    from registry.model.plans.planner import AUTO, Planner

    paths = convoy_paths()
    text = arguments.ref if arguments.ref.startswith("models:/") else f"models:/{arguments.ref}"
    wanted = os.environ.get("CONVOY_PLAN") or AUTO
    threads = arguments.threads or serving_threads()
    planner = Planner(paths.plans, choose_device(arguments.device), threads, wanted)
    with tempfile.TemporaryDirectory(prefix="convoy-plan-") as folder:
        bundle = _find_bundle(parse_model_ref(text), paths, Path(folder))
        selection = planner.choose(bundle, refresh=arguments.refresh)
    manifest = bundle.manifest
    if arguments.json:
        print(json.dumps(msgspec.to_builtins(selection, str_keys=True)))
        return 0
    print(f"{manifest.model} on {planner.device}, {threads} thread(s) a forward pass")
    print(plans_table(selection, manifest))
    return 0


def _find_bundle(ref: ModelRef, paths: Paths, folder: Path) -> "Bundle":
    """The bundle of ``ref``, as the puller deployed it, or else downloaded into ``folder``."""
    from registry.delivery.deployment import all_deployments, version_folder
    from registry.model.bundle import open_bundle

    found = (deployment.find(ref) for deployment in all_deployments(paths.models, ref.name))
    if deployed := next(filter(None, found), None):
        laid_out = version_folder(paths.models, ref.name, deployed.version)
        return open_bundle(laid_out, deployed.manifest_sha256)
    store = open_store()
    return store.download(store.resolve(ref), folder, lambda bundle: bundle.serving_files())


def _serve(arguments: argparse.Namespace) -> int:
    from registry.control.server import serve

    if not arguments.port.isdecimal():
        raise UsageError(f"--port is {arguments.port!r}; it must be a number")
    return serve(arguments.host, int(arguments.port), guard=arguments.guard)


def _pull(arguments: argparse.Namespace) -> int:
    if arguments.ref:
        refs = parse_model_refs(",".join(arguments.ref), said_by="REF")
    else:
        refs = parse_model_refs(os.environ.get("CONVOY_MODEL"))
    if not arguments.interval > 0:
        raise UsageError(f"--interval is {arguments.interval}; it must be above 0 seconds")
    from registry.canary.monitor import CanaryMonitor
    from registry.canary.serving_client import service_addresses
    from registry.delivery.puller import Puller

    services = service_addresses() if arguments.watch and arguments.guard else ()
    monitor = CanaryMonitor(convoy_paths(), services, "puller") if arguments.guard else None
    puller = Puller(open_store, convoy_paths(), refs, monitor)
    if not arguments.watch:
        return 0 if puller.pull_all() else 2
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    os.nice(PULLER_NICE)
    threading.Thread(target=puller.end_if_stalled, args=(stop,), name="stalls", daemon=True).start()
    puller.watch(stop, arguments.interval)
    return 0
