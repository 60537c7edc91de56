"""Deploys the same Compose file as a stack of Swarm, updates it, and rolls back a bad image."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deploy.stack import as_stack
from tests.containers.stack import Stack, load, run, say, wait_until

pytestmark = pytest.mark.containers

NAME = "convoyswarm"
GOOD, BAD = "convoy-service:convoytest-next", "convoy-service:convoytest-bad"


@pytest.fixture(scope="module")
def swarm(up: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The proxy and two replicas as a stack, with volumes that already have a version to serve."""
    up.compose("stop", "-t", "20")
    up.docker("swarm", "init", "--advertise-addr", "127.0.0.1")
    up.environment["CONVOY_BIND"] = "0.0.0.0"  # a stack leaves out ports of loopback
    config = yaml.safe_load(up.compose("config"))
    kept = {"proxy", "service"}
    config["services"] = {name: config["services"][name] for name in kept}
    made = as_stack(config)
    made["volumes"] = {
        name: {"external": True, "name": f"{up.project}_{name}"} for name in ("models", "tokens")
    }
    made["secrets"] = {"service_key": made["secrets"]["service_key"]}
    made["networks"] = {"front": {}}
    file = tmp_path_factory.mktemp("swarm") / "stack.yml"
    file.write_text(yaml.safe_dump(made))
    try:
        deploy = ("docker", "stack", "deploy", "--resolve-image", "never", "-c", str(file), NAME)
        run(*deploy, environment=up.environment)
        yield up
    finally:
        up.docker("stack", "rm", NAME)
        wait_until(lambda: not up.docker("ps", "-aq", "--filter", f"name={NAME}_"))
        up.docker("swarm", "leave", "--force")
        up.docker("rmi", "--force", GOOD, BAD)


def update_state(stack: Stack) -> str:
    (service,) = json.loads(stack.docker("service", "inspect", f"{NAME}_service"))
    state: str = (service.get("UpdateStatus") or {}).get("State", "")
    return state


def test_a_stack_is_updated_and_a_bad_image_is_rolled_back(
    swarm: Stack, tmp_path: Path, picture: bytes
) -> None:
    say(f"Swarm: version 1 serves after {wait_until(lambda: swarm.served_version() == 1):.0f} s")
    swarm.docker("tag", "convoy-service:latest", GOOD)
    (tmp_path / "Dockerfile").write_text(
        'FROM convoy-service:latest\nCMD ["python", "-c", "raise SystemExit(1)"]\n'
    )
    swarm.docker("build", "-q", "-t", BAD, str(tmp_path))
    update = ("service", "update", "--detach", "--no-resolve-image", "--image")
    with load(swarm, picture) as counts:
        swarm.docker(*update, GOOD, f"{NAME}_service")
        took = wait_until(lambda: update_state(swarm) == "completed")
        say(f"Swarm: updated in {took:.0f} s")
        swarm.docker(*update, BAD, f"{NAME}_service")
        took = wait_until(lambda: update_state(swarm) == "rollback_completed")
        say(f"Swarm: rolled back a bad image in {took:.0f} s")
    template = "{{.Spec.TaskTemplate.ContainerSpec.Image}}"
    image = swarm.docker("service", "inspect", "-f", template, f"{NAME}_service")
    assert image == GOOD
    say(f"Swarm: answers by status: {dict(counts)}")
    if set(counts) != {200}:
        say(swarm.docker("service", "ps", "--no-trunc", f"{NAME}_service"))
    assert set(counts) == {200}
