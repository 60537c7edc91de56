"""Make the account with which pullers read MLflow: ``python -m registry.cli.reader_account``.

The containers run this at their start, with the administrator's account. The new account has no
permissions of its own, so it has MLflow's default, READ (deploy/mlflow-auth.ini).
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

import requests

from registry.cli.secret_files import with_secrets
from registry.core.errors import ConvoyError, RegistryUnavailable, UsageError

READER = "reader"
TIMEOUT_S = 30.0


def make_reader(address: str, admin: tuple[str, str], password: str) -> None:
    """Make the account ``reader``, or reset an existing one: ``password``, not an administrator.

    Raises:
        RegistryUnavailable: MLflow does not answer, or refuses.
    """
    users = f"{address}/api/2.0/mlflow/users"
    account = {"username": READER, "password": password}
    made = _call("POST", f"{users}/create", admin, account)
    if "RESOURCE_ALREADY_EXISTS" in made.text:
        less = {"username": READER, "is_admin": False}
        made = _call("PATCH", f"{users}/update-admin", admin, less)
        if made.ok:
            made = _call("PATCH", f"{users}/update-password", admin, account)
    if not made.ok:
        raise RegistryUnavailable(
            f"MLflow did not make the account {READER!r}: {made.status_code} {made.text[:500]}"
        )


def _call(
    method: str, url: str, admin: tuple[str, str], account: dict[str, Any]
) -> requests.Response:
    try:
        return requests.request(method, url, json=account, auth=admin, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        raise RegistryUnavailable(f"MLflow does not answer at {url}: {error}") from error


def main(environment: Mapping[str, str] = os.environ) -> int:
    """Make the account ``reader`` with the settings in ``environment``.

    Returns:
        The exit status: 0, or 2 if a setting is missing or MLflow does not make the account. The
        reason is then on standard error.
    """
    try:
        found = with_secrets(environment)
        try:
            admin = found["MLFLOW_TRACKING_USERNAME"], found["MLFLOW_TRACKING_PASSWORD"]
            make_reader(found["MLFLOW_TRACKING_URI"], admin, found["MLFLOW_READER_PASSWORD"])
        except KeyError as error:
            raise UsageError(
                f"{error.args[0]} is not set; it is needed to make an account"
            ) from error
    except ConvoyError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"the account {READER!r} is ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
