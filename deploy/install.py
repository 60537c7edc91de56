"""Runs ``pip install`` in this environment with constraints.txt, and shows its progress briefly.

pip itself prints too much (a line for each package that is already installed) or, with ``--quiet``,
nothing for minutes. This script passes pip's warnings and errors on unchanged. If the output is not
a terminal, it prints only packages of 10 MB and more. The Makefile calls it:
``python deploy/install.py torch``.
"""

import re
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
LARGE_BYTES = 10_000_000
UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
# "  Downloading torch-2.13.0-cp311-….whl (192.3 MB)", with the full address if the index is not
# PyPI; "Processing /wheels/torch-2.13.0-….whl" if the index is a folder of wheels.
FETCHED = re.compile(
    r"\s*(?:Downloading|Using cached|Processing) (?P<file>\S+\.(?:whl|tar\.gz|zip))"
    r"(?: \((?P<size>[\d.]+) (?P<unit>bytes|kB|MB|GB)\))?(?: \(from .*\))?\s*"
)
EXAMINED = re.compile(r"\s*(?:Collecting|Requirement already satisfied:) (?P<name>[\w.-]+)")
UNPACKING = re.compile(r"Installing collected packages: (?P<names>.+)\s*")


def main() -> int:
    started = time.monotonic()
    terminal = sys.stdout.isatty()
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--constraint", "constraints.txt", *sys.argv[1:]]
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as pip,
        ExitStack() as stack,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            if text := line_to_show(line, 0 if terminal else LARGE_BYTES):
                show(text)
            if terminal and (examined := EXAMINED.match(line)):
                show(examined["name"], keep=False)
            if terminal and (unpacking := UNPACKING.fullmatch(line)):
                stack.enter_context(counting_unpacked(unpacking["names"].split(", ")))
    if pip.returncode == 0:
        show(f"done in {time.monotonic() - started:.0f} s")
    return pip.returncode


def line_to_show(line: str, min_bytes: int) -> str | None:
    """The text to print for a line of pip's output, or None to print nothing.

    There is a text if pip fetches a package of at least ``min_bytes``, or begins to unpack.
    """
    if fetched := FETCHED.fullmatch(line):
        size_bytes = size_of(fetched)
        if size_bytes >= min_bytes:
            size = f" ({readable(size_bytes)})" if size_bytes else ""
            return name_and_version(fetched["file"]) + size
    elif unpacking := UNPACKING.fullmatch(line):
        names = unpacking["names"].split(", ")
        return f"unpacking {names[0] if len(names) == 1 else f'{len(names)} packages'}"
    return None


def size_of(fetched: re.Match[str]) -> float:
    """The size that pip printed, otherwise that of the local file, or 0 if there is none."""
    if fetched["size"]:
        return float(fetched["size"]) * UNITS[fetched["unit"]]
    path = ROOT / fetched["file"]
    return path.stat().st_size if path.is_file() else 0


def name_and_version(file: str) -> str:
    """``torch 2.13.0+cpu`` for ``https://…/torch-2.13.0%2Bcpu-cp311-cp311-….whl``."""
    name, _, rest = unquote(file).rsplit("/", 1)[-1].partition("-")
    version = re.sub(r"-.*|\.(whl|tar\.gz|zip)$", "", rest)
    return f"{name.replace('_', '-')} {version}"


def readable(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.0f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"


@contextmanager
def counting_unpacked(names: list[str]) -> Iterator[None]:
    """Show which package pip is unpacking; pip unpacks them in the order of ``names``."""
    folder = Path(sysconfig.get_path("purelib"))
    before = {*folder.glob("*.dist-info")}
    ended = threading.Event()

    def count() -> None:
        while not ended.wait(0.5):
            number = min(len({*folder.glob("*.dist-info")} - before) + 1, len(names))
            show(f"{number} of {len(names)}: {names[number - 1]}", keep=False)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def show(text: str, *, keep: bool = True) -> None:
    """Print a line; on a terminal it replaces the last line printed with ``keep=False``."""
    clear = "\r\x1b[K" if sys.stdout.isatty() else ""
    # The cursor returns to the start, so that an error that pip prints overwrites the line.
    print(f"{clear}  {text}", end="\n" if keep else "\r", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
