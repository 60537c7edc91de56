"""Several processes change one file at once, and no change is lost."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from registry.auth.tokens import Tokens
from registry.core.files import locked, write_atomically
from registry.core.paths import Paths

CHANGES = 30
# Adds and removes its own tokens while other processes do the same.
CHANGER = """
import sys
from pathlib import Path
from registry.auth.tokens import Tokens
tokens, me = Tokens(Path(sys.argv[1])), sys.argv[2]
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    tokens.add(f"{me}-{number}", "viewer")
    tokens.remove(f"{me}-{number}")
    tokens.add(f"{me}-kept-{number}", "viewer")
tokens.remove(f"revoked-{me}")
"""
# Kills itself while it holds the lock, before its temporary file is flushed.
DIES = """
import os, signal, sys
from pathlib import Path
from registry.core import files
files.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomically(Path(sys.argv[1]), b"half")
"""


def test_no_revoked_token_returns_when_processes_add_and_revoke_at_once(paths: Paths) -> None:
    tokens = Tokens(paths.tokens)
    names = [f"process{number}" for number in range(6)]
    revoked = [tokens.add(f"revoked-{name}", "admin") for name in names]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHANGER, str(paths.tokens), name, str(CHANGES)],
            stdin=subprocess.PIPE,
        )
        for name in names
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()  # all begin at once
    assert [process.wait(timeout=300) for process in processes] == [0] * len(names)
    kept = {f"{name}-kept-{number}" for name in names for number in range(CHANGES)}
    assert {token.name for token in tokens.all()} == kept
    assert not any(tokens.find(text) for text in revoked)


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_content_and_no_lock(
    tmp_path: Path,
) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")
    killed = subprocess.run([sys.executable, "-c", DIES, str(file)], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert file.read_bytes() == b"old"
    write_atomically(file, b"new")
    assert {path.name for path in tmp_path.iterdir()} == {"file", ".lock"}


def test_a_full_disk_leaves_the_old_content_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"file", ".lock"}


def test_a_file_has_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    with locked(tmp_path / "file", mode=0o600) as file:
        assert file.read() is None
        file.replace(b"secret")
        assert file.read() == b"secret"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_a_lock_that_is_a_link_is_refused_and_its_target_is_not_created(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".lock").symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"), locked(folder / "file"):
        pass
    assert not target.exists()
