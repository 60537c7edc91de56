"""Write deploy/hashes.txt: constraints.txt's versions for the images, with the hash of each wheel.

After a change of constraints.txt, run ``python -m deploy.lock`` with pip 25 or newer. Images are
installed with ``--require-hashes``, so an attacker who controls a package index cannot replace the
files of these versions. torch is left out: each index has its own builds (``TORCH_INDEX_URL``).
"""

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from deploy.requirements import requirements

ROOT = Path(__file__).parents[1]
EXTRAS = ["server", "s3", "service", "grpc", "signing", "tracing", "openvino", "training"]
PIP = "pip==26.3"
MACHINES = ("x86_64", "aarch64")
# The platforms that the C library of Debian 12 supports.
MANYLINUX = (
    "manylinux1",
    "manylinux2010",
    "manylinux2014",
    *(f"manylinux_2_{n}" for n in range(5, 37)),
)
HEAD = "# Hashes of the images' packages. Change constraints.txt, then run: python -m deploy.lock\n"


def main() -> int:
    wanted = [each for each in requirements(EXTRAS) if not each.startswith("torch")]
    hashes: dict[str, set[str]] = defaultdict(set)
    for machine in MACHINES:
        for package in resolve([*wanted, PIP], machine):
            facts = package["metadata"]
            digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
            hashes[f"{facts['name'].lower()}=={facts['version']}"].add(digest)
    lines = [
        f"{name} " + " ".join(f"--hash=sha256:{digest}" for digest in sorted(digests))
        for name, digests in sorted(hashes.items())
    ]
    (ROOT / "deploy" / "hashes.txt").write_text(HEAD + "\n".join(lines) + "\n")
    return 0


def resolve(wanted: list[str], machine: str) -> list[dict[str, Any]]:
    """The packages that pip would install on ``machine``, with all dependencies."""
    platforms = [f"--platform={name}_{machine}" for name in MANYLINUX]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", *platforms]
        command += ["--python-version=3.11", "--only-binary=:all:", f"--target={folder}"]
        command += ["--ignore-installed", f"--report={report}", "-c", "constraints.txt", *wanted]
        subprocess.run(command, check=True, cwd=ROOT)
        packages: list[dict[str, Any]] = json.loads(report.read_text())["install"]
        return packages


if __name__ == "__main__":
    sys.exit(main())
