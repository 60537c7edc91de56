"""Convert docker-compose.yml to a stack for Swarm.

``python deploy/stack.py | docker stack deploy --resolve-image never -c - convoy``

Reads the output of ``docker-compose config`` and changes what Swarm needs in another form. A stack
has no starting order: Swarm restarts a container that ends until the others are ready. It has
images instead of builds, names that resolve to every replica, and a rolling update that rolls back
if the new image fails. Swarm ignores ``security_opt``, so the entry points of the images forbid new
privileges themselves. On several nodes, the nodes must share the volume ``models``, or each node
needs a puller.
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
    """The stack for the output of ``docker-compose config``, without the trainer."""
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
    """``each`` without the names that Compose 2 adds, because a stack makes its own."""
    return {key: value for key, value in (each or {}).items() if key not in ("name", "ipam")}


def _service(name: str, service: dict[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in service.items() if key not in NOT_OF_A_STACK}
    deploy = dict(made.get("deploy") or {})
    deploy["endpoint_mode"] = "dnsrr"  # the proxy needs the address of every replica
    # A step that ended without an error is done; Swarm must restart all other services.
    is_step = service.get("restart") == "on-failure"
    deploy["restart_policy"] = {"condition": "on-failure" if is_step else "any", "delay": "2s"}
    limits = (deploy.get("resources") or {}).get("limits") or {}
    if cores := float(limits.pop("cpus", 0)):
        limits["cpus"] = str(cores)  # a stack without a limit has no entry instead of 0
    if name == "service":
        deploy |= ROLLING
    if name in ("database", "mlflow", "control", "puller"):
        deploy["placement"] = {
            "constraints": ["node.role == manager"]
        }  # the node that has their volumes
    made["deploy"] = deploy
    for folder in made.pop("tmpfs", ()):  # Swarm ignores tmpfs silently, but takes it as a volume
        made["volumes"] = [*made.get("volumes", ()), {"type": "tmpfs", "target": folder}]
    if "ports" in made:
        made["ports"] = [port for each in made["ports"] if (port := _port(each))]
    return made


def _port(port: str | dict[str, Any]) -> dict[str, Any] | None:
    """The port, published on the node itself: with ``dnsrr`` a service has no address of its own.

    None for a loopback port: a stack would publish it on all addresses of the node.
    """
    if isinstance(port, dict):  # the form of Compose 2
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
