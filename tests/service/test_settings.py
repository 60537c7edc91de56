import json
import logging
import logging.config
import os
from pathlib import Path

import pytest

from registry.core.errors import UsageError
from registry.model.refs import ModelRef
from service import create_app
from service.observability.logging import logging_config
from service.settings import Settings
from tests.conftest import MakeBundle, wait_for
from tests.service.conftest import REF

ROOT = Path(__file__).parents[2]
# Not for operators: one process of a service, or `make demo`, sets these for others.
MADE_BY_US = {"CONVOY_GPU_SOCKET", "CONVOY_RUN_FOLDER", "CONVOY_DEMO_ONCE"}


def test_every_setting_has_a_default(tmp_path: Path) -> None:
    settings = Settings.from_environment({"CONVOY_HOME": str(tmp_path / "home")})
    assert settings.models == (ModelRef("fashion", alias="champion"),)
    assert settings.host == "127.0.0.1"
    assert settings.workers == len(os.sched_getaffinity(0))
    assert settings.forward_threads == 1
    assert settings.models_folder == tmp_path / "home" / "models"


def test_settings_come_from_the_environment() -> None:
    settings = Settings.from_environment(
        {
            "CONVOY_MODEL": "models:/a@champion,models:/b/3",
            "CONVOY_PORT": "0",
            "CONVOY_WORKERS": "1",
            "CONVOY_DEADLINE_S": "2.5",
            "CONVOY_MAX_PIXELS": "1000",
            "CONVOY_LOG_LEVEL": "warning",
            "CONVOY_DEVICE": "",
        }
    )
    assert [str(ref) for ref in settings.models] == ["models:/a@champion", "models:/b/3"]
    assert (settings.port, settings.workers, settings.deadline_s) == (0, 1, 2.5)
    assert settings.decode_limits.max_pixels == 1000
    assert (settings.log_level, settings.device) == ("WARNING", "auto")
    assert settings.forward_threads == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CONVOY_PORT", "eighty"),
        ("CONVOY_PORT", "70000"),
        ("CONVOY_WORKERS", "0"),
        ("CONVOY_DEADLINE_S", "-1"),
        ("CONVOY_DEADLINE_S", "inf"),
        ("CONVOY_MODEL", "fashion"),
        ("CONVOY_MODEL", "models:/a@b,models:/a/1"),
        ("CONVOY_LOG_LEVEL", "loud"),
        ("CONVOY_MAX_PIXELS", "200000000"),
    ],
)
def test_the_error_about_a_setting_names_it_with_its_value(name: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        Settings.from_environment({name: value})
    assert f"{name}={value!r}" in str(caught.value).replace("'LOUD'", "'loud'")


def test_a_worker_never_opens_a_gpu_itself() -> None:
    with pytest.raises(UsageError, match=r"CONVOY_DEVICE=cuda needs .* convoy serve"):
        create_app(Settings(device="cuda"))


def test_an_app_without_arguments_loads_the_deployment(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from registry.delivery.deployment import DeployedVersion, version_folder, write_deployment

    monkeypatch.setenv("CONVOY_MODEL", "models:/digits@champion")
    monkeypatch.setenv("CONVOY_PLAN", "torch-eager")
    models = tmp_path / "home" / "models"
    bundle = make_bundle(folder=version_folder(models, "digits", 1))
    deployed = DeployedVersion(version=1, manifest_sha256=bundle.manifest_sha256, alias="champion")
    write_deployment(models, REF, (deployed,))
    client = create_app().test_client()
    wait_for(lambda: client.get("/readyz").status_code == 200)
    assert "convoy_serving_version" in client.get("/metrics").text


def test_a_log_line_is_one_json_object_whatever_is_in_it(capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        logging.config.dictConfig(logging_config("INFO"))
        log = logging.getLogger("convoy.test")
        log.info("a %s", 'forged"\n{"level": "error"}', extra={"request_id": "r\n1"})
        try:
            raise ValueError("reason")
        except ValueError as error:
            log.error("failed", exc_info=error)
    finally:
        logging.getLogger().handlers[:], logging.getLogger().level = before
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["level"] for line in lines] == ["info", "error"]
    assert lines[0]["event"] == 'a forged"\n{"level": "error"}'
    assert lines[0]["request_id"] == "r\n1"
    assert "ValueError: reason" in lines[1]["exception"]


def test_the_shutdown_delay_must_leave_time_to_drain() -> None:
    environment = {"CONVOY_SHUTDOWN_DELAY_S": "5", "CONVOY_GRACEFUL_TIMEOUT_S": "8"}
    assert Settings.from_environment(environment).shutdown_delay_s == 5
    with pytest.raises(UsageError, match="leaves no time to drain"):
        Settings.from_environment({**environment, "CONVOY_GRACEFUL_TIMEOUT_S": "7"})
