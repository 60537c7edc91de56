"""Commands that only read: ``list``, ``show``, ``history`` and ``audit``."""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from registry.cli.open import open_store
from registry.cli.render import decision, foreign_table, version_page, versions_table
from registry.core.names import one_line
from registry.model.refs import ref_of

AUDIT_RETRY_S = 2.0


def add_to(commands: Any) -> None:
    """Add these commands to argparse's ``commands``."""
    listing = commands.add_parser("list", help="list models and their versions")
    listing.add_argument("name", nargs="?", help="only this model, with all foreign versions")
    listing.set_defaults(run=_list)

    show = commands.add_parser("show", help="show one version: manifest, metrics, decisions")
    show.add_argument("name")
    show.add_argument("version", nargs="?", default="champion", help="number or alias")
    show.set_defaults(run=_show)
    for command in (listing, show):
        command.add_argument("--json", action="store_true", help="print JSON")

    history = commands.add_parser(
        "history",
        help="list all decisions about a model",
        description="List all decisions about a model. A name with (unverified) comes from the "
        "$LOGNAME of a command line, which its user can set at will. A name without it is that of "
        "a token, which the control plane has checked, or of a machine.",
    )
    history.add_argument("name")
    history.add_argument(
        "--at",
        metavar="DAY",
        help="only the versions that were champion on that day, as 2026-11-17 (UTC)",
    )
    history.add_argument("--json", action="store_true", help="print JSON")
    history.set_defaults(run=_history)

    audit = commands.add_parser(
        "audit",
        help="check the audit log for missing lines, and the aliases against it",
        description="Finds lines of the audit log that are missing or unreadable, a log that "
        "publishing did not make, and aliases or a canary that disagree with it. It does not find "
        "lines that an account with write access to the registry has rewritten.",
    )
    audit.add_argument("name", nargs="?", help="only this model")
    audit.set_defaults(run=_audit)


def _list(arguments: argparse.Namespace) -> int:
    store = open_store()
    names = [arguments.name] if arguments.name else store.models()
    rows = [(version, tags) for name in names for version, tags in store.versions(name)]
    foreign = store.foreign.versions(arguments.name) if arguments.name else store.foreign.newest()
    foreign = list(foreign)
    if arguments.json:
        known = [{**msgspec.to_builtins(version), "tags": tags} for version, tags in rows]
        others = [{**msgspec.to_builtins(each), "import": each.advice} for each in foreign]
        print(json.dumps([*known, *others]))
        return 0
    if not rows and not foreign:
        print("there are no versions yet; publish one with convoy train or convoy import")
        return 0
    if rows:
        print(versions_table(rows))
    if foreign:
        print(foreign_table(foreign))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    store = open_store()
    ref = ref_of(arguments.name, arguments.version)
    version = store.resolve(ref)
    manifest = store.manifest(version)
    with tempfile.TemporaryDirectory(prefix="convoy-show-") as folder:
        evaluation = store.evaluations.read(version, Path(folder))
    lines = store.audit_logs.read(arguments.name).lines
    shown = {
        "version": msgspec.to_builtins(version),
        "manifest": msgspec.to_builtins(manifest),
        "evaluation": msgspec.to_builtins(evaluation),
        "decisions": msgspec.to_builtins(lines),
    }
    if arguments.json:
        print(json.dumps(shown))
        return 0
    print(version_page(version, manifest, evaluation, lines))
    return 0


def _history(arguments: argparse.Namespace) -> int:
    from registry.store.audit_log import moments

    store = open_store()
    store.aliases.read(arguments.name)  # raises if there is no such model
    audit_log = store.audit_logs.read(arguments.name)
    lines = audit_log.champion_periods(*moments(arguments.at)) if arguments.at else audit_log.lines
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
    from registry.promotion.decisions import audit

    store = open_store()
    names = [arguments.name] if arguments.name else store.models()
    failed = False
    for name in names:
        lines, faults = audit(store, name)
        if faults:  # another process may be promoting right now
            time.sleep(AUDIT_RETRY_S)
            lines, faults = audit(store, name)
        failed = failed or bool(faults)
        print(one_line(f"{name}: {lines} lines, {'; '.join(faults) or 'all in order'}"))
    return 1 if failed else 0
