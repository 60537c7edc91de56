"""Secrets of containers: read from files, never half."""

import subprocess
import sys
from pathlib import Path

import pytest

from registry.cli.secret_files import with_secrets
from registry.core.errors import UsageError
from tests.conftest import WAIT_TIMEOUT_S


def test_what_a_file_says_is_in_the_environment(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("opensesame\n")
    found = with_secrets({"A": "1", "PGPASSWORD_FILE": str(tmp_path / "password")})
    assert found["PGPASSWORD"] == "opensesame"  # pragma: allowlist secret
    assert found["A"] == "1"
    assert "HOME" not in with_secrets({"HOME_FILE": "/etc/hostname"})  # not one of ours


def test_a_file_that_is_missing_or_empty_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UsageError, match=r"PGPASSWORD_FILE=.* cannot be read"):
        with_secrets({"PGPASSWORD_FILE": str(tmp_path / "missing")})
    with pytest.raises(UsageError, match="is empty"):
        with_secrets({"PGPASSWORD_FILE": str(tmp_path / "empty")})


def test_the_command_takes_this_process_s_place(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k")
    code = "import os, sys; print(os.environ['CONVOY_SERVICE_KEY'], os.getpid()); sys.exit(7)"
    command = [sys.executable, "-m", "registry.cli.secret_files", sys.executable, "-c", code]
    environment = {"CONVOY_SERVICE_KEY_FILE": str(tmp_path / "key")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        printed, _ = process.communicate(timeout=WAIT_TIMEOUT_S)
    assert printed.decode().split() == ["k", str(process.pid)]
    assert process.returncode == 7


def test_the_command_can_gain_no_privileges() -> None:
    """In a stack of Swarm, too, which ignores Compose's no-new-privileges."""
    command = [sys.executable, "-m", "registry.cli.secret_files", "cat", "/proc/self/status"]
    status = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "NoNewPrivs:\t1\n" in status


@pytest.mark.parametrize(
    ("command", "said"),
    [([], "cannot run ''"), (["no-such-program", "x"], "cannot run 'no-such-program x'")],
)
def test_no_command_is_said(command: list[str], said: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "registry.cli.secret_files", *command],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert said in ended.stderr
