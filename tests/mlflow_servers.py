"""Real MLflow servers with accounts, for tests."""

import configparser
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from registry.cli.reader_account import make_reader
from tests.conftest import free_port, wait_for

AUTH_INI = Path(__file__).parents[1] / "deploy" / "mlflow-auth.ini"
PASSWORDS = {"admin": "the-administrators", "reader": "the-readers-own"}


@contextmanager
def mlflow_server(folder: Path, *, workspaces: bool) -> Iterator[str]:
    """An MLflow server with the settings in deploy/ and an account that has read access."""
    settings = configparser.ConfigParser()
    settings.read(AUTH_INI)
    settings["mlflow"]["database_uri"] = f"sqlite:///{folder / 'accounts.db'}"
    with (folder / "auth.ini").open("w") as file:
        settings.write(file)
    port = free_port()
    environment = {
        **os.environ,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORDS["admin"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a-secret-of-this-test",  # pragma: allowlist secret
        "MLFLOW_ENABLE_WORKSPACES": str(workspaces).lower(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "MLFLOW_ARTIFACTS_DESTINATION": str(folder / "artifacts"),
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = (*("-m", "mlflow", "server", "--app-name", "basic-auth"), "--port", str(port))
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command, "--workers", "1"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(address), (folder / "server.log").read_text()[-2000:])
        for password in (
            "an-earlier-password",
            PASSWORDS["reader"],
        ):  # the second call changes the password
            make_reader(address, ("admin", PASSWORDS["admin"]), password)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/health", timeout=5).status_code == 200
    except requests.RequestException:
        return False
