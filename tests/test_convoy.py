"""The command ``convoy``: its verbs are those of the three packages."""

import argparse
import importlib
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from convoy.__main__ import VERBS, main, usage
from registry.core.names import convoy_version

MODULES = {name: module for verbs in VERBS.values() for name, (module, _) in verbs.items()}


@pytest.mark.parametrize("verb", MODULES)
def test_each_verb_has_a_help_page_under_its_own_name(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: convoy {verb}")


# ``convoy evaluate`` is the registry's verb, with an option that needs training's code.
HOMES = {
    verb: "registry.cli.main" if module == "convoy.evaluate" else module
    for verb, module in MODULES.items()
}


@pytest.mark.parametrize("module", sorted(set(HOMES.values())))
def test_every_verb_of_a_package_is_one_of_convoys_with_the_same_help(module: str) -> None:
    parser = importlib.import_module(module).command_parser("convoy")
    (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    of_package = {action.dest: action.help for action in commands._choices_actions}
    of_convoy = {verb: about for verbs in VERBS.values() for verb, (home, about) in verbs.items()}
    assert of_package == {verb: of_convoy[verb] for verb in HOMES if HOMES[verb] == module}


def test_the_help_page_lists_every_verb_and_imports_no_package() -> None:
    script = (
        "import sys; from convoy.__main__ import main; main(['--help']);"
        "print({'registry', 'service', 'training', 'argparse'} & set(sys.modules))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert printed.endswith("set()\n")
    assert all(f"\n  {verb} " in printed for verb in MODULES)


def test_a_misspelt_verb_is_refused_with_the_one_that_was_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["promot"]) == 2
    assert "did you mean promote?" in capsys.readouterr().err
    assert main(["xyzzy"]) == 2
    assert "convoy --help" in capsys.readouterr().err


def test_ctrl_c_while_a_verb_is_imported_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(name: str) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert main(["classify", "a.png"]) == 130


def test_without_a_verb_the_help_page_goes_to_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 2
    assert usage() in capsys.readouterr().err


def test_an_error_of_a_verb_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVOY_SERVICE_URL", "nonsense")
    assert main(["traffic", "digits"]) == 2
    assert capsys.readouterr().err.startswith("error: CONVOY_SERVICE_URL='nonsense'")


def test_without_an_installed_package_the_version_is_that_of_the_project(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_package(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", no_package)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert convoy_version() == project["version"]
