"""What our own clients return and raise in place of MLflow's entities and exceptions."""

from typing import Generic, TypeVar

from msgspec import Struct


class RegistryError(Exception):
    """The registry refused a call; ``error_code`` is MLflow's."""

    def __init__(self, text: str, error_code: str) -> None:
        super().__init__(text)
        self.error_code = error_code


class RegisteredModel(Struct, frozen=True):
    """As ``mlflow.entities.model_registry.RegisteredModel``; the time is in milliseconds."""

    name: str
    creation_timestamp: int
    tags: dict[str, str]
    aliases: dict[str, int]


class RegisteredVersion(Struct, frozen=True):
    """As ``mlflow.entities.model_registry.ModelVersion``; the time is in milliseconds."""

    name: str
    version: int
    creation_timestamp: int
    tags: dict[str, str]
    run_id: str | None


Entity = TypeVar("Entity")


class Page(list[Entity], Generic[Entity]):
    """One page of a search; ``token`` asks for the next, and is empty after the last."""

    def __init__(self, rows: list[Entity], token: str = "") -> None:  # nosec B107
        super().__init__(rows)
        self.token = token
