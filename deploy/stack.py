"""docker-compose.yml as a stack for Swarm.

``python deploy/stack.py | docker stack deploy --resolve-image never -c - convoy``

Reads what ``docker-compose config`` prints and says what a stack needs otherwise: no order of
starting (a stack starts again what has ended until all are there), images instead of builds, names
that resolve to every replica, a rolling update that takes itself back when the new image is bad.
Swarm ignores ``security_opt``: the images forbid new privileges themselves, at their entry.
On several nodes the volume ``models`` must be one that they share, or each node needs a puller.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

NOT_OF_A_STACK = ("build", "depends_on", "restart", "security_opt", "profiles", "shm_size")
ROLLING: dict[str, Any] = {
    "update_config": {
        "parallelism": 1,
        "order": "start-first",
        "failure_action": "rollback",
        "monitor": "15s",
        "max_failure_ratio": 0.0,
    },
    "rollback_config": {"parallelism": 1, "order": "start-first", "monitor": "5s"},
}


def as_stack(config: dict[str, Any]) -> dict[str, Any]:
    """The stack of what ``docker-compose config`` says; the trainer is not part of it."""
    services = {
        name: _service(name, service)
        for name, service in config["services"].items()
        if "profiles" not in service
    }
    kept = {
        name: {key: _plain(each) for key, each in (config.get(name) or {}).items()}
        for name in ("networks", "volumes", "secrets")
    }
    return {"version": "3.8", "services": services, **kept}


def _plain(each: dict[str, Any] | None) -> dict[str, Any]:
    """Without the names that Compose 2 gives: a stack has its own."""
    return {key: value for key, value in (each or {}).items() if key not in ("name", "ipam")}


def _service(name: str, service: dict[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in service.items() if key not in NOT_OF_A_STACK}
    deploy = dict(made.get("deploy") or {})
    deploy["endpoint_mode"] = "dnsrr"  # the proxy asks for every replica by the service's name
    # A step that has ended well is done; all else is to run always.
    is_step = service.get("restart") == "on-failure"
    deploy["restart_policy"] = {"condition": "on-failure" if is_step else "any", "delay": "2s"}
    limits = (deploy.get("resources") or {}).get("limits") or {}
    if cores := float(limits.pop("cpus", 0)):
        limits["cpus"] = str(cores)  # 0, none, is something that a stack leaves out
    if name == "service":
        deploy |= ROLLING
    if name in ("database", "mlflow", "control", "puller"):
        deploy["placement"] = {"constraints": ["node.role == manager"]}  # where their volumes are
    made["deploy"] = deploy
    for folder in made.pop("tmpfs", ()):  # which a stack leaves out without a word
        made["volumes"] = [*made.get("volumes", ()), {"type": "tmpfs", "target": folder}]
    if "ports" in made:
        made["ports"] = [port for each in made["ports"] if (port := _port(each))]
    return made


def _port(port: str | dict[str, Any]) -> dict[str, Any] | None:
    """On the node itself: names that resolve to replicas have no address of their own.

    None for one of loopback: a stack cannot say which of the node's addresses, and all is too many.
    """
    if isinstance(port, dict):  # as Compose 2 says it
        host, published, target = port.get("host_ip", ""), port["published"], port["target"]
    else:
        host, published, target = port.partition("/")[0].rsplit(":", 2)
    if host.startswith("127.") or host == "::1":
        return None
    return {"target": int(target), "published": int(published), "mode": "host"}


def main() -> int:
    command = [*os.environ.get("COMPOSE", "docker-compose").split(), "config"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    if printed.returncode:
        return printed.returncode
    yaml.safe_dump(as_stack(yaml.safe_load(printed.stdout)), sys.stdout, sort_keys=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
