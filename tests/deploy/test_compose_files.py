"""Checks the Compose files with the old docker-compose and the published schema of the new one."""

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

from deploy.stack import as_stack
from service.observability.metrics import Metrics

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("docker-compose*.yml"))
OBSERVE = ROOT / "deploy" / "observe"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_is_valid_by_the_compose_specification(file: Path) -> None:
    schema = get_builtin_schema("vendor.compose-spec")
    jsonschema.validate(yaml.safe_load(file.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"services": {"x": {"imag": "y"}}}, schema)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_docker_compose_1_29_reads_every_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("docker-compose"):
        pytest.skip("this machine has no docker-compose")
    monkeypatch.setenv("S3_BUCKET", "artefacts")
    command = ["docker-compose", "-f", "docker-compose.yml", "-f", file.name, "config"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    services = yaml.safe_load(ended.stdout)["services"]
    assert {"proxy", "service", "puller", "control", "mlflow", "database"} <= set(services)


@pytest.mark.parametrize(
    ("port", "published"),
    [
        ("0.0.0.0:8080:80/tcp", {"target": 80, "published": 8080, "mode": "host"}),
        ("127.0.0.1:5000:5000/tcp", None),  # other machines must not reach MLflow
        ({"target": 80, "published": "8080"}, {"target": 80, "published": 8080, "mode": "host"}),
        ({"target": 80, "published": "8080", "host_ip": "127.0.0.1"}, None),
    ],
)
def test_a_stack_does_not_publish_ports_of_loopback(port: Any, published: Any) -> None:
    service = {"image": "x", "ports": [port], "tmpfs": ["/tmp"], "depends_on": {"y": {}}}
    made = as_stack({"services": {"mlflow": service, "t": {"profiles": ["train"]}}})
    assert made["services"]["mlflow"]["ports"] == ([published] if published else [])
    assert made["services"]["mlflow"]["volumes"] == [{"type": "tmpfs", "target": "/tmp"}]
    assert set(made["services"]) == {"mlflow"}
    assert "depends_on" not in made["services"]["mlflow"]


def test_a_replica_cannot_write_to_anything_that_replicas_share() -> None:
    config = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    service = config["services"]["service"]
    assert service["read_only"]
    assert service["tmpfs"] == ["/tmp", "/var/lib/convoy/plans"]
    assert all(volume.endswith(":ro") for volume in service["volumes"])
    plain = {key: service[key] for key in ("image", "tmpfs", "volumes")}
    stacked = as_stack({"services": {"service": plain}})["services"]["service"]["volumes"]
    assert {"type": "tmpfs", "target": "/var/lib/convoy/plans"} in stacked


def test_env_example_names_every_setting_of_the_compose_files() -> None:
    named = re.findall(r"^([A-Z_0-9]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    taken = {name for file in FILES for name in re.findall(r"\$\{([A-Z_0-9]+)", file.read_text())}
    assert taken == set(named)
    assert len(named) == len(set(named))


def test_each_alert_fires_when_it_should_and_only_then() -> None:
    if not shutil.which("promtool"):
        pytest.skip("this machine has no promtool (Debian's package prometheus)")
    cases = ROOT / "tests" / "deploy" / "alerts.yml"
    command = ["promtool", "test", "rules", str(cases)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rules = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())["groups"][0]["rules"]
    untested = [rule["alert"] for rule in rules if f'"{rule["alert"]}"' not in cases.read_text()]
    assert not untested


def test_the_service_measures_every_metric_of_the_dashboard_and_the_alerts() -> None:
    measured = {metric.name for metric in Metrics()._registry.collect()}
    dashboard = json.loads((OBSERVE / "grafana" / "dashboards" / "convoy.json").read_text())
    drawn = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())["groups"][0]["rules"]
    for expression in (*drawn, *(rule["expr"] for rule in rules)):
        for name in re.findall(r"\bconvoy_\w+", expression):
            base = re.sub(r"_(total|bucket|sum|count)$", "", name)
            assert base in measured or name in measured, name
    operations = (ROOT / "docs" / "operations.md").read_text()
    for rule in rules:
        assert f"`{rule['alert']}`" in operations, rule["alert"]


def stack() -> dict[str, Any]:
    """The stack of docker-compose.yml, with every setting at its default."""
    text = (ROOT / "docker-compose.yml").read_text()
    return as_stack(yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)))


def test_images_forbid_new_privileges_and_stacks_keep_their_entry_points() -> None:
    """Swarm ignores Compose's security_opt, so the entry points must forbid them."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE) == [
        '["python", "-m", "registry.cli.secret_files"]'  # tests/registry/test_secret_files.py
    ]
    proxy = (ROOT / "deploy" / "proxy" / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["setpriv", "--no-new-privs", ' in proxy
    made = stack()
    built = {name for name, each in made["services"].items() if "convoy" in each["image"].lower()}
    assert built >= {"proxy", "service", "puller", "control", "mlflow", "accounts"}
    assert not [name for name in built if "entrypoint" in made["services"][name]]


def test_the_puller_has_only_an_account_that_can_read() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    puller = services["puller"]
    assert puller["environment"]["MLFLOW_TRACKING_USERNAME"] == "reader"
    assert puller["secrets"] == ["mlflow_reader_password"]
    assert services["mlflow"]["environment"]["MLFLOW_ENABLE_WORKSPACES"] == "true"
    settings = configparser.ConfigParser()
    settings.read(ROOT / "deploy" / "mlflow-auth.ini")
    assert settings["mlflow"]["default_permission"] == "READ"  # of the account ``reader``
    assert settings["mlflow"]["grant_default_workspace_access"] == "true"


def test_only_the_control_plane_can_write_its_sessions_gate_results_and_policies() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    writers = {
        name
        for name, service in services.items()
        for volume in service.get("volumes", ())
        if volume.startswith("control:") and not volume.endswith(":ro")
    }
    assert writers == {"control"}


def test_swarm_does_not_restart_a_step_that_ended_without_an_error() -> None:
    made = stack()["services"]
    assert made["accounts"]["deploy"]["restart_policy"]["condition"] == "on-failure"
    assert made["puller"]["deploy"]["restart_policy"]["condition"] == "any"
