"""The examples of clients/python/README.md, executed, and what the package says about itself."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import convoy_client
from convoy_client.errors import ConvoyError

FOLDER = Path(__file__).parents[2] / "clients" / "python"
PAGE = (FOLDER / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_block_of_python_is_executed() -> None:
    assert len(EXAMPLES) == PAGE.count("```python") >= 5


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(url: str, png: bytes, tmp_path: Path, example: str) -> None:
    (tmp_path / "pictures").mkdir()
    for path in ("picture.png", "pictures/1.png", "pictures/2.png"):
        (tmp_path / path).write_bytes(png)
    (tmp_path / "pictures" / "3.png").write_text("no picture")
    done = subprocess.run(
        [sys.executable, "-c", example.replace("http://127.0.0.1:8080", url)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_page_lists_every_error() -> None:
    kinds = {kind.__name__ for kind in ConvoyError.__subclasses__()}
    assert {
        name for row in re.findall(r"^\| (`.*?) \|", PAGE, re.M) for name in re.findall(r"\w+", row)
    } == kinds
    assert kinds < set(convoy_client.__all__)


def test_the_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    assert project["version"] == convoy_client.__version__
    assert [each.partition(">")[0] for each in project["dependencies"]] == ["httpx"]
    main = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["project"]
    assert main["optional-dependencies"]["client"] == [f"{project['name']}=={project['version']}"]
    assert (FOLDER / "LICENSE").read_text() == (FOLDER.parents[1] / "LICENSE").read_text()


def test_the_example_of_the_api_page_runs(url: str, png: bytes, tmp_path: Path) -> None:
    page = (FOLDER.parents[1] / "docs" / "api.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    test_an_example_runs(url, png, tmp_path, example)
