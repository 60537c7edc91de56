"""The command line's verbs about who may ask and who vouches: ``token``, ``keygen``, ``sign``,
``verify``."""

import argparse
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.cli.open import open_store
from registry.core.errors import UsageError
from registry.core.paths import convoy_paths
from registry.model.refs import ModelVersion, ref_of

if TYPE_CHECKING:
    from registry.store.mlflow_store import ModelStore

DEFAULT_DAYS = 365


def add_to(commands: Any) -> None:
    """Add these verbs to argparse's ``commands``."""
    token = commands.add_parser("token", help="who may use the service and the control plane")
    verbs = token.add_subparsers(required=True, metavar="VERB")
    add = verbs.add_parser("add", help="make a token; it is shown once")
    add.add_argument("name")
    add.add_argument("--role", choices=["classify", "viewer", "admin"], required=True)
    add.set_defaults(run=_add_token)
    remove = verbs.add_parser("remove", help="have a token open nothing any more")
    remove.add_argument("name")
    remove.set_defaults(run=_remove_token)
    verbs.add_parser("list", help="names and roles").set_defaults(run=_list_tokens)

    keygen = commands.add_parser("keygen", help="make a key to sign versions with")
    keygen.add_argument("file", type=Path, help="for the private key; keep it off the registry")
    keygen.set_defaults(run=_keygen)
    sign = commands.add_parser("sign", help="vouch for a version with your key")
    sign.add_argument("--key", type=Path, required=True, metavar="FILE", help="of keygen")
    sign.add_argument("--days", type=int, default=DEFAULT_DAYS, help="that it is good for")
    sign.set_defaults(run=_sign)
    verify = commands.add_parser("verify", help="who vouches for a version, and is it whole")
    verify.set_defaults(run=_verify)
    for command in (sign, verify):
        command.add_argument("name")
        command.add_argument("version", help="its number, or an alias")


def _add_token(arguments: argparse.Namespace) -> int:
    from registry.auth.tokens import Tokens

    text = Tokens(convoy_paths().tokens).add(arguments.name, arguments.role)
    print(text)
    print(f"{arguments.role} {arguments.name}: keep it, it is not shown again", file=sys.stderr)
    return 0


def _remove_token(arguments: argparse.Namespace) -> int:
    from registry.auth.tokens import Tokens

    Tokens(convoy_paths().tokens).remove(arguments.name)
    print(f"the token {arguments.name} opens nothing any more")
    return 0


def _list_tokens(arguments: argparse.Namespace) -> int:
    from registry.auth.tokens import Tokens

    for token in Tokens(convoy_paths().tokens).all():
        print(f"{token.name:<24} {token.role:<10} {token.made}")
    return 0


def _keygen(arguments: argparse.Namespace) -> int:
    from registry.delivery.signing import make_key

    print(make_key(arguments.file))
    print(
        f"{arguments.file} is yours alone; the line above belongs into the file that "
        "CONVOY_TRUSTED_KEYS names, where versions are served",
        file=sys.stderr,
    )
    return 0


def _sign(arguments: argparse.Namespace) -> int:
    from registry.delivery import signing

    if arguments.days < 1:
        raise UsageError(f"--days {arguments.days}: at least 1")
    store, version = _find(arguments)
    with tempfile.TemporaryDirectory(prefix="convoy-sign-") as folder:
        store.download(version, Path(folder))  # nobody should vouch for what cannot be read
    store.sign(version, signing.sign(version, arguments.key, arguments.days))
    print(
        f"signed {version.name} version {version.version}, manifest "
        f"{version.manifest_sha256[:12]}…, good for {arguments.days} days"
    )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from registry.delivery.signing import TrustedKeys

    keys = TrustedKeys.from_environment()
    store, version = _find(arguments)
    with tempfile.TemporaryDirectory(prefix="convoy-verify-") as folder:
        bundle = store.download(version, Path(folder))
    what = f"{version.name} version {version.version}"
    print(f"{what}: {len(bundle.manifest.files)} files, each as its manifest says")
    if not keys:
        print("CONVOY_TRUSTED_KEYS is not set: who signed it was not looked at")
        return 0
    signed = keys.check(version.signature, version.name, version.version, version.manifest_sha256)
    ends = datetime.fromtimestamp(signed.statement.expires_unix_s, UTC)
    ended = ends < datetime.now(UTC)
    print(f"{what}: signed by {signed.by}, {'ENDED' if ended else 'good until'} {ends:%Y-%m-%d}")
    return 1 if ended else 0


def _find(arguments: argparse.Namespace) -> "tuple[ModelStore, ModelVersion]":
    store = open_store()
    return store, store.resolve(ref_of(arguments.name, arguments.version))
