"""Fixtures for the tests of containers. They share one stack, because starting it takes minutes."""

import time
from collections.abc import Iterator

import pytest

from tests.containers.stack import CannotRun, Stack, base_images, engine, say


@pytest.fixture(scope="session")
def docker() -> Iterator[dict[str, str]]:
    """The environment in which Docker answers; prints a notice and skips if it cannot run here."""
    try:
        with engine() as environment:
            base_images(environment)
            yield environment
    except CannotRun as reason:
        say(f"NOT TESTED: this machine runs no containers: {reason}")
        pytest.skip(f"this machine runs no containers: {reason}")


@pytest.fixture(scope="session")
def stack(docker: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with all images built; at the end, checks that no container or volume is left."""
    files = "docker-compose.yml:docker-compose.grpc.yml"
    made = Stack(docker, tmp_path_factory.mktemp("stack"), COMPOSE_FILE=files)
    try:
        say("building the images")
        say(f"built in {made.build('proxy', 'service', 'puller', 'trainer'):.0f} s")
        yield made
    finally:
        made.down()
    assert not made.left_behind()


@pytest.fixture(scope="session")
def up(stack: Stack) -> Stack:
    """The running stack; its champion is version 1, trained on Fashion-MNIST for one epoch."""
    started = time.perf_counter()
    stack.up()
    stack.wait_healthy("mlflow", "control")
    say(f"up in {time.perf_counter() - started:.0f} s; training")
    stack.train()
    stack.registry("promote", "fashion", "challenger")
    stack.wait_for_version(1)
    say(f"from nothing to the first answer: {time.perf_counter() - started:.0f} s")
    return stack


@pytest.fixture(scope="session")
def picture(up: Stack) -> bytes:
    return up.picture()


@pytest.fixture(scope="session")
def second_version(up: Stack) -> None:
    """Version 2, a smaller network, whose epoch takes less time; nothing is promoted."""
    up.train("--recipe", "dense", "--seed", "1")
