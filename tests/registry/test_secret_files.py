"""Secrets of containers are read from files; a missing or empty file stops the start."""

import subprocess
import sys
from pathlib import Path

import pytest

from registry.cli.secret_files import with_secrets
from registry.core.errors import UsageError
from tests.conftest import WAIT_TIMEOUT_S


def test_the_content_of_a_secret_file_is_put_into_the_environment(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("opensesame\n")
    found = with_secrets({"A": "1", "PGPASSWORD_FILE": str(tmp_path / "password")})
    assert found["PGPASSWORD"] == "opensesame"  # pragma: allowlist secret
    assert found["A"] == "1"
    assert "HOME" not in with_secrets({"HOME_FILE": "/etc/hostname"})  # not a secret of Convoy


def test_a_file_that_is_missing_or_empty_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UsageError, match=r"PGPASSWORD_FILE=.* cannot be read"):
        with_secrets({"PGPASSWORD_FILE": str(tmp_path / "missing")})
    with pytest.raises(UsageError, match="is empty"):
        with_secrets({"PGPASSWORD_FILE": str(tmp_path / "empty")})


def test_the_command_replaces_the_process_that_read_the_secrets(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k")
    code = "import os, sys; print(os.environ['CONVOY_SERVICE_KEY'], os.getpid()); sys.exit(7)"
    command = [sys.executable, "-m", "registry.cli.secret_files", sys.executable, "-c", code]
    environment = {"CONVOY_SERVICE_KEY_FILE": str(tmp_path / "key")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        printed, _ = process.communicate(timeout=WAIT_TIMEOUT_S)
    assert printed.decode().split() == ["k", str(process.pid)]
    assert process.returncode == 7


def test_the_command_cannot_gain_privileges() -> None:
    """Docker Swarm ignores Compose's no-new-privileges, so the process must forbid it itself."""
    command = [sys.executable, "-m", "registry.cli.secret_files", "cat", "/proc/self/status"]
    status = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "NoNewPrivs:\t1\n" in status


@pytest.mark.parametrize(
    ("command", "message"),
    [([], "cannot run ''"), (["no-such-program", "x"], "cannot run 'no-such-program x'")],
)
def test_the_error_names_a_command_that_cannot_run(command: list[str], message: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "registry.cli.secret_files", *command],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert message in ended.stderr
