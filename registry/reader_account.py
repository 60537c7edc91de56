"""Make the account with which pullers read MLflow: ``python -m registry.reader_account``.

A step of the containers' start, with the administrator's account. The new account has no rights of
its own: MLflow's default, READ, is all that it may (deploy/mlflow-auth.ini).
"""

import os
import sys
from collections.abc import Mapping

import requests

from registry.errors import ConvoyError, RegistryUnavailable, UsageError
from registry.secret_files import with_secrets

READER = "reader"
TIMEOUT_S = 30.0


def make_reader(address: str, admin: tuple[str, str], password: str) -> None:
    """Make the account, or give it this ``password`` if it is there.

    Raises:
        RegistryUnavailable: MLflow does not answer, or refuses.
        UsageError: the account is there and is an administrator.
    """
    users = f"{address}/api/2.0/mlflow/users"
    account = {"username": READER, "password": password}
    made = _call("POST", f"{users}/create", admin, account)
    if "RESOURCE_ALREADY_EXISTS" in made.text:
        known = _call("GET", f"{users}/get?username={READER}", admin)
        if _is_admin(known):
            raise UsageError(
                f"MLflow's account {READER!r} is an administrator, and pullers must only read: "
                "take that right from it, or delete it, and start this step again"
            )
        made = _call("PATCH", f"{users}/update-password", admin, account)
    if not made.ok:
        raise RegistryUnavailable(
            f"MLflow did not make the account {READER!r}: {made.status_code} {made.text[:500]}"
        )


def _is_admin(answer: requests.Response) -> bool:
    """Whether MLflow's ``answer`` about an account calls it an administrator.

    Raises:
        RegistryUnavailable: MLflow does not say.
    """
    try:
        return bool(answer.json()["user"]["is_admin"])
    except (ValueError, KeyError, TypeError) as error:
        raise RegistryUnavailable(
            f"MLflow does not say what the account {READER!r} may do: "
            f"{answer.status_code} {answer.text[:500]}"
        ) from error


def _call(
    method: str, url: str, admin: tuple[str, str], account: dict[str, str] | None = None
) -> requests.Response:
    try:
        return requests.request(method, url, json=account, auth=admin, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        raise RegistryUnavailable(f"MLflow does not answer at {url}: {error}") from error


def main(environment: Mapping[str, str] = os.environ) -> int:
    try:
        found = with_secrets(environment)
        try:
            admin = found["MLFLOW_TRACKING_USERNAME"], found["MLFLOW_TRACKING_PASSWORD"]
            make_reader(found["MLFLOW_TRACKING_URI"], admin, found["MLFLOW_READER_PASSWORD"])
        except KeyError as error:
            raise UsageError(f"{error.args[0]} is not set") from error
    except ConvoyError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"the account {READER!r} is there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
