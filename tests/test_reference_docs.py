"""The tables of docs/operations.md and docs/training.md list what the code reads, and no more."""

import argparse
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import msgspec.inspect
import msgspec.structs
import pytest

from registry.canary.serving_client import service_addresses
from registry.cli.main import command_parser as registry_parser
from registry.core.devices import serving_threads
from registry.model.image.limits import DecodeLimits
from registry.model.networks import NETWORKS
from registry.model.plans.base import find_plan
from service.settings import GPU_SOCKET, RUN_FOLDER, VARIABLES, Settings
from training.__main__ import command_parser as training_parser
from training.data.sources import DEFAULT_SIZE_PX
from training.fitting.parameters import NETWORK, TRAINING, Parameter
from training.fitting.recipes import RECIPES, Recipe

ROOT = Path(__file__).parents[1]


def rows(page: str, kind: str) -> dict[str, list[str]]:
    """The rows of the tables whose first heading is ``kind``: name → the other cells."""
    found, heading = {}, ""
    for line in (ROOT / "docs" / page).read_text().splitlines():
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        if heading == kind and line.startswith("| "):
            found[first.strip("`")] = others
        heading = (heading or first) if line.startswith("|") else ""
    return found


def code_in(cell: str) -> str:
    """The text in backticks with which ``cell`` begins; empty if it begins with other text."""
    return found[1] if (found := re.match(r"`([^`]+)`", cell)) else ""


SETTINGS = rows("operations.md", "setting")
OURS = {name: cells for name, cells in SETTINGS.items() if name.startswith("CONVOY_")}
IN_ENV = rows("operations.md", "in `.env`")
OPTIONS = rows("training.md", "option")
PARAMETERS = rows("training.md", "parameter")


@pytest.mark.parametrize("cells", [*SETTINGS.values(), *IN_ENV.values(), *OPTIONS.values()])
def test_each_row_has_an_example_and_says_when_to_use_it(cells: list[str]) -> None:
    default, _, example = cells
    assert default
    assert re.fullmatch(r"`[^`]+`: .+", example)
    assert code_in(example) != code_in(default)


def test_the_operations_page_lists_exactly_the_settings_that_the_code_reads() -> None:
    folders = ("convoy", "clients", "service", "registry", "training", "deploy")
    files = [file for each in folders for file in (ROOT / each).rglob("*.*")]
    text = "\n".join(file.read_text() for file in files if file.suffix in (".py", ".sh"))
    read = set(re.findall(r"(?:[\"']|\$\{)(CONVOY_[A-Z_]+)(?=[\"':}])", text))
    assert set(OURS) == read - {GPU_SOCKET, RUN_FOLDER}


def parse(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> tuple[Any, ...]:
    """All that Convoy reads from an environment with one variable; the settings first."""
    monkeypatch.delenv("CONVOY_HOME", raising=False)
    monkeypatch.setenv(name, value)
    settings, limits = Settings.from_environment(), DecodeLimits.from_environment()
    assert settings.plan == "auto" or find_plan(settings.plan)
    control = registry_parser("convoy").parse_args(["control"])
    assert control.port.isdecimal()
    return settings, limits, service_addresses(), serving_threads(), control.host, control.port


@pytest.mark.parametrize("name", OURS)
def test_each_setting_has_its_true_default_and_an_example_that_the_code_accepts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    default, _, example = map(code_in, OURS[name])
    for script in (ROOT / "deploy").glob("*.sh"):
        assert set(re.findall(rf"\$\{{{name}:-(.*?)}}", script.read_text())) <= {default}
    unset = parse(monkeypatch, name, "")
    assert parse(monkeypatch, name, default) == unset
    if not default and name != "CONVOY_WORKERS":  # one a core
        assert getattr(unset[0], VARIABLES.get(name, ""), None) in (None, "")
    parse(monkeypatch, name, example)


def test_each_setting_of_the_compose_files_has_its_true_default() -> None:
    text = "\n".join(file.read_text() for file in ROOT.glob("docker-compose*.yml"))
    defaults = dict(re.findall(r"\$\{([A-Z_0-9]+)(?::-([^}]*)|:\?[^}]*)}", text))
    assert set(IN_ENV) <= set(defaults)
    assert {name: code_in((SETTINGS | IN_ENV)[name][0]) for name in defaults} == defaults


def limits(kind: msgspec.inspect.Type) -> set[str]:
    """The limits of a number, or the values of a choice in backticks."""
    if isinstance(kind, msgspec.inspect.UnionType):
        return set().union(*map(limits, kind.types))
    if isinstance(kind, msgspec.inspect.LiteralType):
        return {f"`{value}`" for value in kind.values}
    numbers = [getattr(kind, each, None) for each in ("gt", "ge", "lt", "le")]
    return {f"{n:,.0f}" if n > 99_999 else f"{n:g}" for n in numbers if n is not None}


def test_each_number_has_its_range_and_each_choice_its_values() -> None:
    settings = {field: OURS[name][1] for name, field in VARIABLES.items() if name in OURS}
    recipe = {name: f"{cells[0]} {cells[3]}" for name, cells in PARAMETERS.items()}
    fields = {field.name for field in msgspec.structs.fields(Recipe)}
    assert fields - set(PARAMETERS) == {"name", "network"}
    for record, texts in ((Settings, settings), (Recipe, recipe)):
        types = {field.name: field.type for field in msgspec.structs.fields(record)}
        for name in texts.keys() & types.keys():
            words = {word.strip(",;.:") for word in texts[name].split()}
            assert limits(msgspec.inspect.type_info(types[name])) <= words, name


def default_of(recipe: Recipe, name: str) -> str:
    """The value of a parameter in ``recipe``, as ``--set`` takes it."""
    own = inspect.signature(NETWORKS[recipe.network.name]).parameters.get(name)
    value = recipe.network.args.get(name, own.default) if own else getattr(recipe, name)
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if value is None:
        return "by the pictures"
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


@pytest.mark.parametrize(("network", "parameters"), [(None, TRAINING), *NETWORK.items()])
def test_each_parameter_has_its_true_defaults(
    network: str | None, parameters: tuple[Parameter, ...]
) -> None:
    recipes = [each for each in RECIPES.values() if network in (None, each.network.name)]
    recipes.sort(key=lambda recipe: recipe.name != "cnn")
    page = (ROOT / "docs" / "training.md").read_text()
    for each in parameters:
        values = {recipe.name: default_of(recipe, each.name) for recipe in recipes}
        first, *_ = values.values()
        others = [f"; `{name}` {value}" for name, value in values.items() if value != first]
        row = f"| `{each.name}` | {each.meaning} | `{each.setting}` | {first}{''.join(others)} | "
        assert row in page


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_each_option_of_a_training_has_its_true_default(verb: str) -> None:
    parser = training_parser("convoy")
    (verbs,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    for action in verbs.choices[verb]._actions[1:]:  # the first is --help
        default, _, example = map(code_in, OPTIONS[action.option_strings[-1]])
        true = str(DEFAULT_SIZE_PX if action.dest == "image_size" else action.default)
        assert default == ("" if true in ("None", "False", "[]") else true)
        parser.parse_args([verb, *shlex.split(example)])
