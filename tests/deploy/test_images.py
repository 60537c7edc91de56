"""The images install packages by hash, in the versions that were tested together."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.lock import EXTRAS
from deploy.requirements import requirements

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def pins(file: str) -> dict[str, str]:
    """Versions by canonical name, from lines like ``name==version …``."""
    lines = re.findall(r"^([^#=\s]+)==(\S+)", (ROOT / file).read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}


def test_the_hashes_belong_to_the_versions_that_were_tested_together() -> None:
    tested, hashed = pins("constraints.txt"), pins("deploy/hashes.txt")
    other = {name for name in hashed if name != "pip" and tested.get(name) != hashed[name]}
    assert not other, "run: python -m deploy.lock"
    lines = (ROOT / "deploy" / "hashes.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"\S+==\S+( --hash=sha256:[0-9a-f]{64})+", line) for line in lines)


@pytest.mark.parametrize(
    "extras", re.findall(r"requirements\.py ([a-z0-9 ]+?) (?:>|\|)", DOCKERFILE)
)
def test_every_package_that_an_image_installs_has_a_hash(extras: str) -> None:
    assert set(extras.split()) <= {*EXTRAS, "torch"}
    wanted = {canonicalize_name(Requirement(each).name) for each in requirements(extras.split())}
    assert wanted - {"torch"} <= set(pins("deploy/hashes.txt"))


def test_only_torch_is_installed_without_its_hash() -> None:
    commands = re.findall(r"pip install[^\n]*", DOCKERFILE)
    unhashed = [each.rstrip(" \\") for each in commands if "--require-hashes" not in each]
    assert (
        unhashed
        == [
            "pip install -c constraints.txt "
            "${TORCH_INDEX_URL:+--extra-index-url ${TORCH_INDEX_URL}} -r wanted"
        ]
        * 2
    )
    assert len(re.findall(r"requirements\.py torch >wanted", DOCKERFILE)) == 2


def test_the_build_context_contains_every_file_that_the_dockerfile_copies() -> None:
    allowed = {
        line[1:].rstrip("/")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source.rstrip("/") for line in copies for source in line.split()}
    assert len(sources) > 5
    assert sources <= allowed
