"""The real app behind a real socket, pictures in a folder, and the command line in this process."""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from convoy.__main__ import main
from registry.auth.tokens import Tokens
from service import create_app
from service.loading.model_slot import ModelSlot
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.service.conftest import app as app
from tests.service.conftest import client as client
from tests.service.conftest import deploy as deploy
from tests.service.conftest import deploy_canary as deploy_canary
from tests.service.conftest import listening
from tests.service.conftest import metrics as metrics
from tests.service.conftest import models as models
from tests.service.conftest import ready as ready
from tests.service.conftest import settings as settings
from tests.service.conftest import slot as slot
from tests.service.conftest import url as url
from training.data.sources import Dataset

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``convoy classify`` with the given words; returns status, output and errors."""

    def classify(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["classify", *map(str, words)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return classify


@pytest.fixture
def secured_url(
    ready: object,
    slot: ModelSlot,
    settings: Settings,
    metrics: Metrics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """A service that requires tokens; ``CONVOY_TOKEN`` has one that may only classify."""
    file = tmp_path / "tokens.json"
    monkeypatch.setenv("CONVOY_TOKEN", Tokens(file).add("client", "classify"))
    secured = replace(settings, auth="required", tokens=file)
    with listening(create_app(secured, {"digits": slot}, metrics)) as url:
        yield url


@pytest.fixture
def picture(tmp_path: Path, png: bytes) -> str:
    path = tmp_path / "picture.png"
    path.write_bytes(png)
    return str(path)


@pytest.fixture
def pictures(tmp_path: Path, few_digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder ``pictures`` of the working directory: seven pictures and some other files."""
    folder = tmp_path / "work" / "pictures"
    (folder / "more").mkdir(parents=True)
    for number in range(7):
        name = f"more/{number}.png" if number > 4 else f"{number}.png"
        (folder / name).write_bytes(few_digits.test.encode(number))
    (folder / "notes.txt").write_text("not a picture")
    (folder / ".hidden.png").write_bytes(b"x")
    monkeypatch.chdir(folder.parent)
    return Path("pictures")


def other_picture() -> bytes:
    """A picture that is not one of the digits."""
    buffer = BytesIO()
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(buffer, "PNG")
    return buffer.getvalue()
