"""The tutorial, executed as a newcomer types it: each command, and the output on the page.

Each line of a ``text`` block must be a line of the output, in the same order. In it, ``…`` stands
for any text, and a number for any number, unless it is that of a version: times and accuracies
differ from machine to machine. A line ``…`` stands for any lines.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import WAIT_TIMEOUT_S, free_port

pytestmark = pytest.mark.e2e

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()
STEPS = re.findall(r"```sh\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", PAGE, re.DOTALL)
ADDRESS = "127.0.0.1:8080"
NUMBER = r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?"
VERSION = r"(?:version|champion|challenger)\"?[ :]+\d+\b(?!\.\d)"
TOKEN = re.compile(rf"(…|{VERSION}|{NUMBER}|\s+)")


def pattern(shown: str) -> str:
    """The regular expression of the lines that the line ``shown`` of the page stands for."""

    def stands_for(part: str) -> str:
        if part == "…":
            return ".*"
        if part.isspace():
            return r"\s+"
        return NUMBER if re.fullmatch(NUMBER, part) else re.escape(part)

    return "".join(map(stands_for, TOKEN.split(shown.strip())))


def first_missing(shown: str, output: str) -> str | None:
    """The first line of the page's block ``shown`` that ``output`` lacks, or None."""
    lines = (line.strip() for line in output.splitlines())
    for each in filter(lambda line: line.strip() != "…", shown.splitlines()):
        if not any(re.fullmatch(pattern(each), line) for line in lines):
            return each
    return None


class Terminal:
    """Runs commands in bash. Each command begins in the folder in which the last one ended."""

    def __init__(self, checkout: Path, port: int) -> None:
        self._folder = checkout
        self._note = checkout / "folder"
        self._port = port
        self._environment = {
            **os.environ,
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "CONVOY_PORT": str(port),
            "CONVOY_PLAN": "torch-eager",  # benchmarking all plans takes a minute
            "CONVOY_DEVICE": "cpu",
            "CONVOY_WORKERS": "2",
        }
        del self._environment["CONVOY_HOME"]  # the page relies on the default

    def _bash(self, command: str) -> list[str]:
        command = command.replace(ADDRESS, f"127.0.0.1:{self._port}")
        return ["bash", "-e", "-o", "pipefail", "-c", command]

    def run(self, command: str) -> str:
        """The output of ``command``, which must end with exit status 0."""
        done = subprocess.run(
            self._bash(f"{command}\npwd >{self._note}"),
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WAIT_TIMEOUT_S,
        )
        assert done.returncode == 0, f"status {done.returncode} of\n{command}\n{done.stdout}"
        self._folder = Path(self._note.read_text().strip())
        return done.stdout

    @contextmanager
    def running(self, command: str, log: Path) -> Iterator[None]:
        """Run ``command`` until the block ends; then press Ctrl-C, and expect exit status 0."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._bash(command),
                cwd=self._folder,
                env=self._environment,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches all processes of a terminal's foreground
            )
        try:
            yield
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(WAIT_TIMEOUT_S) == 0, log.read_text()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(log.read_text())  # pytest shows it if the test fails


def expect(shown: str, command: str, read: Callable[[], str], *, repeat: bool) -> None:
    """Fail unless what ``read`` returns is as the page shows it; ``repeat``: within a while."""
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while (line := first_missing(shown, output := read())) is not None:
        is_late = not repeat or time.monotonic() > deadline
        assert not is_late, f"the page shows\n{line}\nfor\n{command}\nwhich printed\n{output}"
        time.sleep(0.1)


def test_each_command_of_the_tutorial_prints_what_the_page_shows(tmp_path: Path) -> None:
    assert len(STEPS) >= 15
    assert PAGE.count("```text") == sum(bool(shown) for _, shown in STEPS)
    checkout, log, port = tmp_path / "checkout", tmp_path / "serve.log", free_port()
    checkout.mkdir()
    (checkout / ".venv").symlink_to(sys.prefix)
    first = Terminal(checkout, port)
    with ExitStack() as stack:
        for command, shown in STEPS:
            if "convoy serve" in command:
                stack.enter_context(Terminal(checkout, port).running(command, log))
                expect(shown, command, log.read_text, repeat=True)
                continue
            # These only read, and the service follows a decision a moment later.
            reads = "curl" in command or "convoy traffic" in command
            expect(shown, command, partial(first.run, command), repeat=reads)
