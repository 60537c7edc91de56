"""The examples of docs/api.md and docs/clients.md, executed: commands, and their answers' form."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from service.loading.model_slot import ModelSlot
from tests.conftest import WAIT_TIMEOUT_S
from tests.service.conftest import REF

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [(DOCS / name).read_text() for name in ("api.md", "clients.md")]
EXAMPLES = [
    example
    for page in PAGES
    for example in re.findall(r"```sh\n(.*?)```\n```json\n(.*?)```", page, re.DOTALL)
]


def form(value: Any) -> Any:
    """``value`` with the type in place of each value, as values differ from run to run."""
    if isinstance(value, dict):
        return {key: form(each) for key, each in value.items()}
    if isinstance(value, list):
        return [form(each) for each in value]
    return "number" if isinstance(value, int | float) else type(value).__name__


def test_every_command_on_the_page_has_an_answer() -> None:
    assert len(EXAMPLES) >= 13
    for count in (lambda page: page.count("```sh"), lambda page: page.count("```json")):
        assert sum(map(count, PAGES)) == len(EXAMPLES)


@pytest.mark.parametrize(("command", "answer"), EXAMPLES)
def test_an_example_answers_as_the_page_says(
    url: str, slot: ModelSlot, png: bytes, tmp_path: Path, command: str, answer: str
) -> None:
    from registry.delivery.deployment import write_status

    write_status(slot._models_folder, REF, None)
    (tmp_path / "picture.png").write_bytes(png)
    command = command.replace("http://127.0.0.1:8080", url).replace("/fashion", "/digits")
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=WAIT_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    assert form(json.loads(done.stdout)) == form(json.loads(answer))
