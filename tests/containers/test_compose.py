"""Runs the stack of docker-compose.yml: trains, promotes, classifies, breaks and restores it."""

import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.containers.stack import ROOT, Stack, load, say

pytestmark = pytest.mark.containers

# gRPC takes 22 MB of the service, OpenTelemetry 7.
MAX_BYTES = {"service": 380_000_000, "registry": 1_000_000_000}


def test_the_first_picture_is_classified_through_the_proxy(up: Stack, picture: bytes) -> None:
    answer = up.classify(picture)
    assert answer["model"]["version"] == 1
    assert answer["predictions"][0]["label"] == "Ankle boot"


def test_images_are_small_and_their_containers_do_not_run_as_root(up: Stack) -> None:
    for name, most in MAX_BYTES.items():
        size = int(up.docker("image", "inspect", "-f", "{{.Size}}", f"convoy-{name}:latest"))
        say(f"convoy-{name}: {size / 1e6:.0f} MB")
        assert size < most
    assert "mlflow" not in up.compose("exec", "-T", "service", "ls", "/opt/venv/bin")
    for service in ("service", "puller", "control", "mlflow"):
        status = up.compose("exec", "-T", service, "cat", "/proc/1/status")
        uid, capabilities = (
            re.findall(rf"{name}:\s+(\w+)", status)[0] for name in ("Uid", "CapEff")
        )
        assert (uid, int(capabilities, 16)) == ("10001", 0)
        with pytest.raises(AssertionError, match=r"Read-only file system"):
            up.compose("exec", "-T", service, "touch", "/app/written")


def test_the_service_cannot_reach_the_registry_or_write_to_the_models(up: Stack) -> None:
    connect = "import socket; socket.create_connection(('{}', {}), 3)"
    for host, port in (("mlflow", 5000), ("database", 5432)):
        with pytest.raises(AssertionError, match=r"gaierror|timed out"):
            up.compose("exec", "-T", "service", "python", "-c", connect.format(host, port))
    with pytest.raises(AssertionError, match=r"Read-only file system"):
        up.compose("exec", "-T", "service", "touch", "/var/lib/convoy/models/x")


def test_the_registry_refuses_requests_without_a_password(up: Stack) -> None:
    code = (
        "import urllib.request as r, urllib.error as e\n"
        "try: r.urlopen('http://mlflow:5000/api/2.0/mlflow/experiments/search?max_results=1')\n"
        "except e.HTTPError as error: print(error.code)"
    )
    assert up.compose("exec", "-T", "control", "python", "-c", code).strip() == "401"


@pytest.mark.usefixtures("second_version")
def test_every_request_is_answered_while_the_stack_changes(up: Stack, picture: bytes) -> None:
    """Promotes, kills, scales, restarts and stops the registry; each answer must be 200."""
    with load(up, picture) as counts:
        up.registry("promote", "fashion", "challenger", "--force", "--reason", "a test")
        say(f"version 2 after {up.wait_for_version(2):.1f} s")
        say("killing a replica")
        up.docker("kill", "--signal", "KILL", up.replicas()[0])
        time.sleep(3)
        say("4 replicas, the killed one among them, then 1, then 2")
        for replicas in (4, 1, 2):
            up.up("service", replicas=replicas)
            up.wait_healthy("service")  # a replica chooses its plan when it starts
        say("the registry stops")
        up.compose("stop", "mlflow", "database")
        time.sleep(3)
        up.docker("restart", "-t", "45", up.replicas()[0])
        up.compose("start", "database", "mlflow")
        up.wait_healthy("mlflow")
        up.registry("roll-back", "fashion", "--reason", "a test")
        say(f"version 1 again after {up.wait_for_version(1):.1f} s")
    say(f"answers by status: {dict(counts)}")
    assert set(counts) == {200}


def test_a_registry_that_was_destroyed_is_restored(
    up: Stack, tmp_path: Path, picture: bytes
) -> None:
    def facts() -> str:
        listed = up.registry("list"), up.registry("history", "fashion")
        runs = up.compose(
            "exec", "-T", "database", "psql", "-U", "mlflow", "-Atc",
            "select run_uuid, status from runs order by 1",
        )  # fmt: skip
        return "\n".join([*listed, runs])

    before = facts()
    assert "promote" in before
    up.registry("token", "add", "ann", "--role", "viewer")
    file = tmp_path / "backup.tar"
    environment = up.environment
    with load(up, picture, 20) as counts:
        subprocess.run(["deploy/backup.sh", str(file)], cwd=ROOT, env=environment, check=True)
        up.compose("rm", "-sf", "mlflow", "control", "puller", "database")
        for volume in ("database", "artifacts", "control"):
            up.docker("volume", "rm", f"{up.project}_{volume}")
        started = time.perf_counter()
        subprocess.run(["deploy/restore.sh", str(file)], cwd=ROOT, env=environment, check=True)
        up.wait_healthy("mlflow", "control")
        say(f"restored in {time.perf_counter() - started:.0f} s")
        address = "postgresql+psycopg2://mlflow@database/mlflow"
        up.compose("run", "--rm", "-T", "mlflow", "mlflow", "db", "upgrade", address)
    assert facts() == before
    assert "ann" in up.registry("token", "list")
    assert set(counts) == {200}
    # The files are restored, too: a pull into an empty home gets a complete version.
    paths = ("-e", "CONVOY_HOME=/tmp/restored", "control")
    up.compose("exec", "-T", *paths, "python", "-m", "registry", "pull", "models:/fashion@champion")
    backup = file.read_bytes()
    changed = backup.replace(b'"schema_version": 4', b'"schema_version": 5', 1)
    assert changed != backup
    file.write_bytes(changed)
    damaged = subprocess.run(
        ["deploy/restore.sh", str(file)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert damaged.returncode == 1
    assert "is damaged; nothing was changed" in damaged.stderr
    assert facts() == before


def test_the_puller_s_account_can_read_but_not_decide(up: Stack) -> None:
    """It could pull the version that serves, but can neither move an alias nor create a model."""

    def ask(service: str, path: str, data: dict[str, str]) -> str:
        """The status with which MLflow answers the account of ``service``."""
        code = (
            "import base64, json, os, urllib.error as e, urllib.request as r\n"
            "password = open(os.environ['MLFLOW_TRACKING_PASSWORD_FILE']).read()\n"
            "account = os.environ['MLFLOW_TRACKING_USERNAME'] + ':' + password\n"
            "token = base64.b64encode(account.encode()).decode()\n"
            f"url = 'http://mlflow:5000/api/2.0/mlflow/{path}'\n"
            "headers = {'Content-Type': 'application/json', 'Authorization': 'Basic ' + token}\n"
            f"request = r.Request(url, json.dumps({data!r}).encode(), headers)\n"
            "try: print(r.urlopen(request).status)\n"
            "except e.HTTPError as error: print(error.code)"
        )
        return up.compose("exec", "-T", service, "python", "-c", code).strip()

    moved = {"name": "fashion", "alias": "champion", "version": "1"}
    assert ask("puller", "registered-models/alias", moved) == "403"
    assert ask("puller", "registered-models/create", {"name": "letters.ledger"}) == "403"
    assert ask("control", "registered-models/alias", moved) == "200"
