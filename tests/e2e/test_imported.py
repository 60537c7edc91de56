"""An imported model under load: signed, a canary, promoted, rolled back, served in int8."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.traffic import Traffic, in_thread, post
from tests.conftest import wait_for
from tests.e2e.processes import Service, run
from tests.training.importing.conftest import LABELS
from tests.training.importing.graphs import spatial
from tests.training.importing.test_import import SPEC

pytestmark = pytest.mark.e2e

RATE = 30.0
ENOUGH = 40  # requests


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What an owner has: a graph, labels, the preprocessing, and 24 pictures without labels."""
    random = np.random.default_rng(2)
    (tmp_path / "pictures").mkdir()
    for number in range(24):
        rough = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8))
        rough.resize((60, 44), Image.Resampling.BICUBIC).save(tmp_path / f"pictures/{number}.png")
    (tmp_path / "animals.onnx").write_bytes(spatial())
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    (tmp_path / "spec.toml").write_text(SPEC)
    (tmp_path / "home").mkdir()
    return tmp_path


def convoy(home: Path, *words: str) -> str:
    ended = run(home / "home", "convoy", *words)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_an_imported_model_is_released_as_any_other(home: Path) -> None:
    words = (
        "import", str(home / "animals.onnx"), "--labels", str(home / "labels.txt"),
        "--preprocess", str(home / "spec.toml"), "--examples", str(home / "pictures"), "--json",
    )  # fmt: skip
    key = home / "key"
    trusted = home / "trusted.txt"
    trusted.write_text(convoy(home, "keygen", str(key)))
    for version in ("1", "2"):
        imported = json.loads(convoy(home, *words).splitlines()[-1])
        assert imported["version"] == int(version)
        convoy(home, "sign", "animals", version, "--key", str(key))
    is_int8_right = imported["plan_accuracy"].get("openvino-int8") == 1.0
    plan = "openvino-int8" if is_int8_right else "openvino-fp32"
    convoy(home, "promote", "animals", "1")

    service = Service(
        home / "home", CONVOY_MODEL="models:/animals@champion", CONVOY_PLAN=plan,
        CONVOY_TRUSTED_KEYS=str(trusted), CONVOY_DEVICE="cpu",
    )  # fmt: skip

    def status() -> dict[str, object]:
        return service.ask("GET", "/v1/models/animals")[1]

    def answers(version: int) -> int:
        asked = service.ask("POST", "/v1/classify?top_k=1", picture)
        assert asked[0] == 200, asked
        return int(asked[1]["model"]["version"] == version)

    picture = (home / "pictures" / "0.png").read_bytes()
    try:
        wait_for(lambda: service.process.poll() is None and ready(service), service.log.read_text())
        assert status()["plan"] == plan
        traffic = Traffic(service.port, lambda: post(picture), RATE)
        with in_thread(traffic):
            wait_for(lambda: answers(1), "version 1 does not answer")
            convoy(home, "canary", "start", "animals", "--challenger", "2", "--share", "50%")
            wait_for(lambda: answers(2), "the canary does not answer")
            convoy(home, "canary", "stop", "animals")
            convoy(home, "promote", "animals", "2", "--force", "--reason", "no labelled pictures")
            wait_for(lambda: status()["version"] == 2, "version 2 does not serve")
            convoy(home, "roll-back", "animals")
            wait_for(lambda: status()["version"] == 1, "version 1 does not serve again")
        counts = Counter(row.status for row in traffic.rows)
        assert set(counts) == {200}, service.log.read_text()
        assert counts[200] > ENOUGH
    finally:
        if service.process.is_running():
            service.stop()


def ready(service: Service) -> bool:
    try:
        return service.ask("GET", "/readyz")[0] == 200
    except OSError:
        return False
