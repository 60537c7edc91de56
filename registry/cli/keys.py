"""Commands about tokens and signatures: ``token``, ``keygen``, ``sign``, ``verify``."""

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
    """Add these commands to argparse's ``commands``."""
    token = commands.add_parser(
        "token", help="manage the tokens for the service and the control plane"
    )
    actions = token.add_subparsers(required=True, metavar="ACTION")
    add = actions.add_parser("add", help="make a token and print it; it is not shown again")
    add.add_argument("name")
    add.add_argument("--role", choices=["classify", "viewer", "admin"], required=True)
    add.set_defaults(run=_add_token)
    remove = actions.add_parser(
        "remove", help="remove a token: the service and the control plane refuse it"
    )
    remove.add_argument("name")
    remove.set_defaults(run=_remove_token)
    actions.add_parser("list", help="list names and roles").set_defaults(run=_list_tokens)

    keygen = commands.add_parser("keygen", help="make a key to sign versions with")
    keygen.add_argument(
        "file", type=Path, help="where to write the private key; keep it off the registry's host"
    )
    keygen.set_defaults(run=_keygen)
    sign = commands.add_parser("sign", help="sign a version with your private key")
    sign.add_argument(
        "--key", type=Path, required=True, metavar="FILE", help="the private key that keygen wrote"
    )
    sign.add_argument(
        "--days", type=int, default=DEFAULT_DAYS, help="how long the signature is valid"
    )
    sign.set_defaults(run=_sign)
    verify = commands.add_parser("verify", help="check the files and the signature of a version")
    verify.set_defaults(run=_verify)
    for command in (sign, verify):
        command.add_argument("name")
        command.add_argument("version", help="number or alias")


def _add_token(arguments: argparse.Namespace) -> int:
    from registry.auth.tokens import Tokens

    text = Tokens(convoy_paths().tokens).add(arguments.name, arguments.role)
    print(text)
    print(
        f"the {arguments.role} token of {arguments.name}: keep it, it is not shown again",
        file=sys.stderr,
    )
    return 0


def _remove_token(arguments: argparse.Namespace) -> int:
    from registry.auth.tokens import Tokens

    Tokens(convoy_paths().tokens).remove(arguments.name)
    print(f"the token {arguments.name} is removed and no longer accepted")
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
        f"{arguments.file} has the private key: keep it secret. Add the line above to the file "
        "that CONVOY_TRUSTED_KEYS names, on the machines that serve versions",
        file=sys.stderr,
    )
    return 0


def _sign(arguments: argparse.Namespace) -> int:
    from registry.delivery import signing

    if arguments.days < 1:
        raise UsageError(f"--days is {arguments.days}; it must be at least 1")
    store, version = _find(arguments)
    with tempfile.TemporaryDirectory(prefix="convoy-sign-") as folder:
        store.download(version, Path(folder))  # sign only a version whose files are intact
    store.sign(version, signing.sign(version, arguments.key, arguments.days))
    print(
        f"signed {version.name} version {version.version}, manifest "
        f"{version.manifest_sha256[:12]}…, valid for {arguments.days} days"
    )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from registry.delivery.signing import TrustedKeys

    keys = TrustedKeys.from_environment()
    store, version = _find(arguments)
    with tempfile.TemporaryDirectory(prefix="convoy-verify-") as folder:
        bundle = store.download(version, Path(folder))
    what = f"{version.name} version {version.version}"
    print(f"{what}: all {len(bundle.manifest.files)} files match the manifest")
    if not keys:
        print("CONVOY_TRUSTED_KEYS is not set: the signature was not checked")
        return 0
    signed = keys.check(version.signature, version.name, version.version, version.manifest_sha256)
    ends = datetime.fromtimestamp(signed.statement.expires_unix_s, UTC)
    expired = ends < datetime.now(UTC)
    validity = "EXPIRED" if expired else "valid until"
    print(f"{what}: signed by {signed.by}, {validity} {ends:%Y-%m-%d}")
    return 1 if expired else 0


def _find(arguments: argparse.Namespace) -> "tuple[ModelStore, ModelVersion]":
    store = open_store()
    return store, store.resolve(ref_of(arguments.name, arguments.version))
